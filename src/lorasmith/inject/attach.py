"""Put LoRA on a model, read it back, take it off."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lorasmith.errors import AdapterFileError, MergeStateError
from lorasmith.inject.choose import misfit, mixins_for
from lorasmith.inject.experts import LoRAExperts, attach_experts, stacks_by_module
from lorasmith.inject.fresh import fresh_adapter
from lorasmith.inject.kinds import AdaptedLayer, linear_shape
from lorasmith.inject.layer import LoRALayer, attach_to, detach_from, shape_of
from lorasmith.inject.report import InjectReport
from lorasmith.inject.rows import TokenRowsLayer, attach_rows, rows_fault, tied_faults
from lorasmith.inject.tying import parameter_slots
from lorasmith.inject.whole import exchange_weights, put_parameter, weight_faults
from lorasmith.lora import Adapter, Extras, Factors, LoRAConfig, TokenRows
from lorasmith.quantised import quantisation_of

_ATTRIBUTE = "lorasmith_injection"


@dataclass
class Injection:
    """What `inject` noted on the model, so that `extract` and `eject` are exact.

    Attributes:
        biases: module path → the base's own bias, for the biases that train or were replaced.
        requires_grad: names of the base's parameters that required a gradient before.
        weights: name → the base's own parameter, for those that another one stands in for.
        saved: names of the whole weights that belong to the adapter.
        rows: paths of the embeddings whose rows the adapter trains.
    """

    config: LoRAConfig
    biases: dict[str, Tensor]
    requires_grad: set[str]
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def inject(model: nn.Module, config_or_adapter: LoRAConfig | Adapter, *, seed: int = 0) -> InjectReport:
    """Put fresh factors (from a config) or trained ones (from an adapter) on `model`, in place.

    The base is frozen: afterwards only `lora_A`, `lora_B` and the biases that the config names
    require a gradient. With fresh factors B = 0, so every output is bit-identical to the base's.

    Args:
        seed: decides A. Each module's start depends on the seed and its path alone.

    Raises:
        TargetError: a target matches nothing, or something that cannot carry LoRA.
        AdapterFileError: the adapter does not fit this model; every fault is listed, nothing attached.
        MergeStateError: the model already carries LoRA.
    """
    if injection_of(model) is not None:
        raise MergeStateError(
            "inject: this model already carries LoRA. Use switch(model, adapter) to exchange it, "
            "or eject(model) to take it off first."
        )
    if isinstance(config_or_adapter, Adapter):
        adapter = config_or_adapter
        check_fit(model, adapter)
    else:
        adapter = fresh_adapter(model, config_or_adapter, seed)
        check_fit(model, adapter)
    return _attach(model, adapter)


def extract(model: nn.Module) -> Adapter:
    """Read the adapter that `model` carries: an independent copy, on the CPU.

    Raises:
        MergeStateError: the model carries no LoRA.
    """
    injection = _require_injection(model, "extract")
    factors: dict[str, Factors] = {}
    for path, layer in adapted_layers(model).items():
        if isinstance(layer, LoRALayer):
            factors[path] = _to_cpu(layer.factors)
        elif isinstance(layer, LoRAExperts):
            factors |= {f"{path}.{name}": _to_cpu(f) for name, f in layer.expert_factors().items()}
    biases = {path: _bias(model, path).detach().cpu().clone() for path in injection.biases}
    return Adapter(injection.config, factors, biases, extras=_extract_extras(model, injection))


def eject(model: nn.Module) -> None:
    """Take LoRA off: classes, biases and `requires_grad` are what they were before `inject`.

    Raises:
        MergeStateError: the model carries no LoRA.
    """
    injection = _require_injection(model, "eject")
    for layer in adapted_layers(model).values():
        detach_from(layer)
    for name, own in injection.weights.items():
        put_parameter(model, name, own)
    for path, bias in injection.biases.items():
        _bias(model, path).data.copy_(bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in injection.requires_grad)
        parameter.grad = None
    del model.__dict__[_ATTRIBUTE]


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Path → every layer of `model` that carries factors."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Path → every module of `model` whose class an adapter changed: layers, stacks of experts, token rows."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def carries_any(model: nn.Module) -> bool:
    """Whether any module of `model` is changed by an adapter, be it by an `inject` that failed half way."""
    return bool(adapted_layers(model))


def injection_of(model: nn.Module) -> Injection | None:
    """What `inject` noted on `model`, if it carries LoRA."""
    return model.__dict__.get(_ATTRIBUTE)


def check_fit(model: nn.Module, adapter: Adapter) -> None:
    """Check that every tensor of `adapter` has its place in `model`.

    Raises:
        AdapterFileError: listing every missing module and every pair of shapes that disagree.
    """
    modules = dict(model.named_modules())
    faults = [fault for path, f in adapter.factors.items() if (fault := misfit(modules, path, f, adapter))]
    for path, bias in adapter.biases.items():
        own = getattr(modules.get(path), "bias", None)
        if not isinstance(own, Tensor) or own.shape != bias.shape:
            there = tuple(own.shape) if isinstance(own, Tensor) else "no bias"
            faults.append(f"{path}.bias: adapter {tuple(bias.shape)}, model {there}")
    faults += _extras_faults(model, adapter)
    if not adapter.factors and not adapter.extras:
        faults.append("the adapter holds no factors")
    if faults:
        raise AdapterFileError(
            f"The adapter does not fit {type(model).__name__}; nothing was attached:\n  "
            + "\n  ".join(dict.fromkeys(faults))
        )


def _extras_faults(model: nn.Module, adapter: Adapter) -> list[str]:
    extras = adapter.extras
    faults = weight_faults(model, extras.weights)
    faults += [fault for path, rows in extras.rows.items() if (fault := rows_fault(model, path, rows))]
    faults += [
        f"{path}: it has trained token rows and factors, which is one too many"
        for path in extras.rows
        if path in adapter.factors
    ]
    faults += tied_faults(dict(parameter_slots(model)), adapter)
    for what, vectors in (("shift", extras.shifts), ("magnitude", extras.magnitudes)):
        for path, vector in vectors.items():
            pair = adapter.factors.get(path)
            if pair is None or vector.shape != (pair.out_features,):
                there = f"B {tuple(pair.B.shape)}" if pair else "no factors"
                faults.append(f"{path}: a {what} of shape {tuple(vector.shape)}, {there}")
    return faults


def _attach(model: nn.Module, adapter: Adapter) -> InjectReport:
    own = {path: _bias(model, path).detach().clone() for path in adapter.biases}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    weights = exchange_weights(model, adapter.extras.weights, adapter.factors)
    for path, rows in adapter.extras.rows.items():
        attach_rows(model, path, rows)
    for path, factors in adapter.factors.items():
        if factors.layout.kind != "expert":
            _attach_layer(modules[path], path, factors, adapter)
    for owner, by_name in stacks_by_module(adapter).items():
        attach_experts(modules[owner], by_name)
    for path, bias in adapter.biases.items():
        parameter = _bias(model, path)
        parameter.data.copy_(bias)
        parameter.requires_grad_(True)
    model.__dict__[_ATTRIBUTE] = Injection(
        adapter.config, own, trainable, weights, tuple(adapter.extras.weights), tuple(adapter.extras.rows)
    )
    return _report(model, modules, adapter)


def _attach_layer(module: nn.Module, path: str, factors: Factors, adapter: Adapter) -> None:
    spans = adapter.config.parts_of(path)
    if spans:
        module.lora_spans = spans  # type: ignore[assignment]
    layer = attach_to(
        module, factors, dropout=adapter.config.dropout, mixins=mixins_for(module, path, adapter)
    )
    for name, vectors in _vectors(adapter.extras).items():
        if path in vectors:
            value = vectors[path].detach().to(layer.lora_A.device, layer.lora_A.dtype, copy=True)
            layer.register_parameter(name, nn.Parameter(value))


def _vectors(extras: Extras) -> dict[str, dict[str, Tensor]]:
    return {"lora_shift": extras.shifts, "lora_magnitude": extras.magnitudes}


@torch.no_grad()
def _extract_extras(model: nn.Module, injection: Injection) -> Extras:
    named = dict(model.named_parameters(remove_duplicate=False))
    extras = Extras({name: named[name] for name in injection.saved})
    for path in injection.rows:
        layer = model.get_submodule(path)
        assert isinstance(layer, TokenRowsLayer)
        extras.rows[path] = TokenRows(layer.lora_row_ids, layer.lora_rows)
    for path, lora in lora_layers(model).items():
        for name, vectors in _vectors(extras).items():
            if (vector := lora._parameters.get(name)) is not None:
                vectors[path] = vector
    return extras.to()


def _report(model: nn.Module, modules: dict[str, nn.Module], adapter: Adapter) -> InjectReport:
    parameters, packed = list(model.parameters()), quantisation_of(model)
    return InjectReport(
        ranks={path: f.rank for path, f in adapter.factors.items()},
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        total_params=sum(p.numel() for p in parameters) + (packed.params if packed else 0),
        not_matched=tuple(
            path for path, m in modules.items() if linear_shape(m) is not None and path not in adapter.factors
        ),
        transposed=tuple(p for p in adapter.factors if p in modules and shape_of(modules[p]).transposed),
    )


def _require_injection(model: nn.Module, verb: str) -> Injection:
    injection = injection_of(model)
    if injection is None:
        raise MergeStateError(f"{verb}: this model carries no LoRA. Call inject(model, config) first.")
    return injection


def _bias(model: nn.Module, path: str) -> nn.Parameter:
    bias = model.get_submodule(path).bias
    assert isinstance(bias, nn.Parameter)
    return bias


@torch.no_grad()
def _to_cpu(factors: Factors) -> Factors:
    return replace(factors, A=factors.A.cpu().clone(), B=factors.B.cpu().clone())
