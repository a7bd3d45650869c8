"""Which class of LoRA layer each pair of an adapter needs, and why some have none."""

from __future__ import annotations

from torch import nn

from lorasmith.inject.conv import LoRAConv
from lorasmith.inject.dora import DoRAConv, DoRAEmbedding, DoRALinear
from lorasmith.inject.embedding import LoRAEmbedding
from lorasmith.inject.experts import expert_shape, stacked_parameters
from lorasmith.inject.kinds import ConvNd, layer_shape, why_not
from lorasmith.inject.layer import LoRALayer
from lorasmith.inject.parts import LoRAParts, spans_fault
from lorasmith.inject.shift import LoRAShift
from lorasmith.lora import Adapter, Factors, gather, group_spans


def mixins_for(module: nn.Module, path: str, adapter: Adapter) -> tuple[type[LoRALayer], ...]:
    """The classes to mix into `module`'s own."""
    is_dora = path in adapter.extras.magnitudes
    kind: type[LoRALayer]
    if isinstance(module, nn.Embedding):
        kind = DoRAEmbedding if is_dora else LoRAEmbedding
    elif isinstance(module, ConvNd):
        kind = DoRAConv if is_dora else LoRAConv
    elif is_dora:
        kind = DoRALinear
    else:
        kind = LoRAParts if adapter.config.parts_of(path) else LoRALayer
    return (LoRAShift, kind) if path in adapter.extras.shifts else (kind,)


def misfit(modules: dict[str, nn.Module], path: str, factors: Factors, adapter: Adapter) -> str | None:
    """Why `factors` cannot go on the module at `path`."""
    if factors.layout.kind == "expert":
        return _expert_misfit(modules, path, factors, adapter)
    if path not in modules:
        return f"{path}: no such module in the model"
    module = modules[path]
    reason = why_not(module, modules.get(path.rpartition(".")[0]))
    shape = layer_shape(module)
    if reason or shape is None:
        return f"{path}: {reason or 'not a layer that can carry LoRA'}"
    if (factors.in_features, factors.out_features) != (shape.in_features, shape.out_features):
        return (
            f"{path}: adapter A {tuple(factors.A.shape)}, B {tuple(factors.B.shape)}; "
            f"model in_features {shape.in_features}, out_features {shape.out_features}"
        )
    return _blocks_misfit(module, path, factors, adapter)


def _blocks_misfit(module: nn.Module, path: str, factors: Factors, adapter: Adapter) -> str | None:
    spans = adapter.config.parts_of(path)
    if spans and (isinstance(module, nn.Embedding | ConvNd) or path in adapter.extras.magnitudes):
        return f"{path}: parts are for linear layers without DoRA"
    if isinstance(module, nn.Embedding) and path in adapter.extras.shifts:
        return f"{path}: an embedding has no bias inside its factors (lora_bias); leave it out of the targets"
    if isinstance(module, ConvNd) and module.groups > 1:
        if path in adapter.extras.magnitudes:
            return (
                f"{path}: DoRA on a convolution with groups is not defined, its V is no weight of that layer"
            )
        spans = group_spans(factors.out_features, module.groups)
    try:
        if spans and not (fault := spans_fault(spans, factors.out_features)):
            gather(factors.B, spans)
            return None
    except ValueError as error:
        return f"{path}: {error}"
    return f"{path}: {fault}" if spans else None


def _expert_misfit(
    modules: dict[str, nn.Module], path: str, factors: Factors, adapter: Adapter
) -> str | None:
    stack, _, number = path.rpartition(".")
    owner, _, name = stack.rpartition(".")
    if owner not in modules or name not in stacked_parameters(modules[owner]):
        return f"{stack}: no such stacked parameter in the model"
    experts, width, out = expert_shape(modules[owner], name)
    if path in adapter.extras.shifts or path in adapter.extras.magnitudes:
        return f"{stack}: stacked experts have no bias inside their factors (lora_bias) and no DoRA"
    if adapter.config.dropout:
        return f"{stack}: dropout on the input of a stacked parameter is not defined; use dropout 0"
    if not number.isdigit() or int(number) >= experts:
        return f"{path}: {stack} has {experts} experts"
    if (factors.in_features, factors.out_features) != (width, out):
        return (
            f"{path}: adapter A {tuple(factors.A.shape)}, B {tuple(factors.B.shape)}; "
            f"model in_features {width}, out_features {out}"
        )
    return None
