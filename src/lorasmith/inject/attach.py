"""Put LoRA on a model, read it back, take it off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasmith.errors import AdapterFileError, MergeStateError
from lorasmith.inject.kinds import linear_shape, why_not
from lorasmith.inject.layer import LoRALayer, attach_to, detach_from, shape_of
from lorasmith.inject.report import InjectReport
from lorasmith.inject.targets import resolve_targets
from lorasmith.lora import Adapter, Factors, LoRAConfig, generator_for, init_factors

_ATTRIBUTE = "lorasmith_injection"


@dataclass
class Injection:
    """What `inject` noted on the model, so that `extract` and `eject` are exact.

    Attributes:
        biases: module path → the base's own bias, for the biases that train or were replaced.
        requires_grad: names of the base's parameters that required a gradient before.
    """

    config: LoRAConfig
    biases: dict[str, Tensor]
    requires_grad: set[str]


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
        adapter = _fresh_adapter(model, config_or_adapter, seed)
    return _attach(model, adapter)


def extract(model: nn.Module) -> Adapter:
    """Read the adapter that `model` carries: an independent copy, on the CPU.

    Raises:
        MergeStateError: the model carries no LoRA.
    """
    injection = _require_injection(model, "extract")
    factors = {path: _to_cpu(layer.factors) for path, layer in lora_layers(model).items()}
    biases = {path: _bias(model, path).detach().cpu().clone() for path in injection.biases}
    return Adapter(injection.config, factors, biases)


def eject(model: nn.Module) -> None:
    """Take LoRA off: classes, biases and `requires_grad` are what they were before `inject`.

    Raises:
        MergeStateError: the model carries no LoRA.
    """
    injection = _require_injection(model, "eject")
    for layer in lora_layers(model).values():
        detach_from(layer)
    for path, bias in injection.biases.items():
        _bias(model, path).data.copy_(bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in injection.requires_grad)
        parameter.grad = None
    del model.__dict__[_ATTRIBUTE]


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Path → every module of `model` that carries factors."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}


def injection_of(model: nn.Module) -> Injection | None:
    """What `inject` noted on `model`, if it carries LoRA."""
    return model.__dict__.get(_ATTRIBUTE)


def check_fit(model: nn.Module, adapter: Adapter) -> None:
    """Check that every tensor of `adapter` has its place in `model`.

    Raises:
        AdapterFileError: listing every missing module and every pair of shapes that disagree.
    """
    modules = dict(model.named_modules())
    faults = [fault for path, f in adapter.factors.items() if (fault := _misfit(modules, path, f))]
    for path, bias in adapter.biases.items():
        own = getattr(modules.get(path), "bias", None)
        if not isinstance(own, Tensor) or own.shape != bias.shape:
            there = tuple(own.shape) if isinstance(own, Tensor) else "no bias"
            faults.append(f"{path}.bias: adapter {tuple(bias.shape)}, model {there}")
    if not adapter.factors:
        faults.append("the adapter holds no factors")
    if faults:
        raise AdapterFileError(
            f"The adapter does not fit {type(model).__name__}; nothing was attached:\n  "
            + "\n  ".join(faults)
        )


def _misfit(modules: dict[str, nn.Module], path: str, factors: Factors) -> str | None:
    if path not in modules:
        return f"{path}: no such module in the model"
    reason = why_not(modules[path], modules.get(path.rpartition(".")[0]))
    shape = linear_shape(modules[path])
    if reason or shape is None:
        return f"{path}: {reason or 'not a linear layer'}"
    if (factors.in_features, factors.out_features) != (shape.in_features, shape.out_features):
        return (
            f"{path}: adapter A {tuple(factors.A.shape)}, B {tuple(factors.B.shape)}; "
            f"model in_features {shape.in_features}, out_features {shape.out_features}"
        )
    return None


def _fresh_adapter(model: nn.Module, config: LoRAConfig, seed: int) -> Adapter:
    factors = {}
    for path, module in resolve_targets(model, config).chosen.items():
        shape = shape_of(module)
        factors[path] = init_factors(
            shape.in_features,
            shape.out_features,
            rank=config.rank_of(path),
            scaling=config.scaling_of(path),
            generator=generator_for(seed, path),
            init=config.init,
        )
    return Adapter(config, factors, _biases_to_train(model, config, factors))


def _biases_to_train(model: nn.Module, config: LoRAConfig, targets: dict[str, Factors]) -> dict[str, Tensor]:
    if config.bias == "none":
        return {}
    modules = dict(model.named_modules())
    paths = targets if config.bias == "lora_only" else modules
    found = {path: getattr(modules[path], "bias", None) for path in paths}
    return {path: bias.data for path, bias in found.items() if isinstance(bias, nn.Parameter)}


def _attach(model: nn.Module, adapter: Adapter) -> InjectReport:
    own = {path: _bias(model, path).detach().clone() for path in adapter.biases}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for path, factors in adapter.factors.items():
        attach_to(modules[path], factors, dropout=adapter.config.dropout)
    for path, bias in adapter.biases.items():
        parameter = _bias(model, path)
        parameter.data.copy_(bias)
        parameter.requires_grad_(True)
    model.__dict__[_ATTRIBUTE] = Injection(adapter.config, own, trainable)
    return _report(model, modules, adapter)


def _report(model: nn.Module, modules: dict[str, nn.Module], adapter: Adapter) -> InjectReport:
    parameters = list(model.parameters())
    return InjectReport(
        ranks={path: f.rank for path, f in adapter.factors.items()},
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        total_params=sum(p.numel() for p in parameters),
        not_matched=tuple(
            path for path, m in modules.items() if linear_shape(m) is not None and path not in adapter.factors
        ),
        transposed=tuple(path for path in adapter.factors if shape_of(modules[path]).transposed),
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
    return Factors(factors.A.cpu().clone(), factors.B.cpu().clone(), factors.scaling)
