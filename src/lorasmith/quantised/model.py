"""Exchange the linear layers of a model for quantised ones, and back for plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasmith.errors import ConfigError, did_you_mean
from lorasmith.quantised.codes import NF4_BLOCK, SCALES_BLOCK
from lorasmith.quantised.layer import Int8Linear, NF4Linear, QuantisedLinear

KINDS: dict[str, type[QuantisedLinear]] = {kind.kind: kind for kind in (NF4Linear, Int8Linear)}


@dataclass(frozen=True)
class Quantisation:
    """What of a model is quantised.

    Attributes:
        kind: `"nf4"` or `"int8"`.
        params: weights in that format.
        stored_bytes: of their codes and scales.
        largest: weights of the largest layer, which exists in full for a while.
    """

    kind: str
    layers: int
    params: int
    stored_bytes: int
    largest: int


def require_kind(kind: str) -> type[QuantisedLinear]:
    """The layer class of a format.

    Raises:
        ConfigError: there is no such format.
    """
    if kind not in KINDS:
        raise ConfigError(
            f'quantize="{kind}" is unknown: use {" or ".join(KINDS)}.{did_you_mean(kind, KINDS)}'
        )
    return KINDS[kind]


def quantise_linears(
    model: nn.Module, kind: str, *, dtype: torch.dtype, then: Callable[[Tensor], object] = lambda _: None
) -> Quantisation:
    """Put every linear layer of `model` but its output head into `kind`, in place, one after the other.

    Args:
        dtype: that `weight` is given back in.
        then: is called with each full weight that is no longer used.

    Raises:
        ConfigError: the format is unknown, or the model has no linear layer that can be quantised.
    """
    make = require_kind(kind)
    for path, layer in list(_linears(model)):
        owner, _, name = path.rpartition(".")
        old = layer.weight.data
        new = make(old, layer.bias, dtype=dtype).train(layer.training)
        setattr(model.get_submodule(owner), name, new)
        layer._parameters.clear()
        then(old)
    found = quantisation_of(model)
    if found is None:
        raise ConfigError(
            f'quantize="{kind}": {type(model).__name__} has no plain linear layer besides its output head. '
            "Load it without --quantize."
        )
    return found


@torch.no_grad()
def dequantise_linears(model: nn.Module) -> None:
    """Put plain linear layers that hold the dequantised weights in the place of quantised ones."""
    for path, layer in list(_quantised(model)):
        owner, _, name = path.rpartition(".")
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight, requires_grad=False)
        plain.register_parameter("bias", layer.bias)
        setattr(model.get_submodule(owner), name, plain.train(layer.training))


def quantisation_of(model: nn.Module) -> Quantisation | None:
    """What of `model` is quantised, or None."""
    layers = [layer for _, layer in _quantised(model)]
    if not layers:
        return None
    sizes = [layer.in_features * layer.out_features for layer in layers]
    stored = sum(layer.stored_bytes for layer in layers)
    return Quantisation(layers[0].kind, len(layers), sum(sizes), stored, max(sizes))


def predicted_quantisation(model: nn.Module, kind: str) -> Quantisation:
    """What `quantise_linears` would report, from shapes alone; works on the meta device.

    Raises:
        ConfigError: there is no such format.
    """
    require_kind(kind)
    shapes = [(layer.out_features, layer.in_features) for _, layer in _linears(model)]
    sizes = [rows * columns for rows, columns in shapes]
    stored = sum(stored_bytes(kind, *shape) for shape in shapes)
    return Quantisation(kind, len(shapes), sum(sizes), stored, max(sizes, default=0))


def is_quantisable(module: nn.Module, model: nn.Module) -> bool:
    """Whether `quantise_linears` would change this module of `model`."""
    get_head = getattr(model, "get_output_embeddings", None)
    return type(module) is nn.Linear and module is not (get_head() if callable(get_head) else None)


def stored_bytes(kind: str, rows: int, columns: int) -> int:
    """Of codes and scales of a weight (rows, columns)."""
    if kind == "int8":
        return rows * columns + 4 * rows
    blocks = -(-rows * columns // NF4_BLOCK)
    return blocks * (NF4_BLOCK // 2) + blocks + 4 * -(-blocks // SCALES_BLOCK) + 4


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    inside = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]  # reads weights uncalled
    spared = {id(part) for whole in inside for part in whole.modules()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantisable(module, model) and id(module) not in spared:
            yield path, module


def _quantised(model: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    for path, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            yield path, module
