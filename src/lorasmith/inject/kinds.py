"""Which modules can carry LoRA, told by what they are and never by an architecture's name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LinearShape:
    """y = x @ Wᵀ + b. `transposed`: the weight is stored (in_features, out_features)."""

    in_features: int
    out_features: int
    transposed: bool = False


def linear_shape(module: nn.Module) -> LinearShape | None:
    """Shape of a linear layer of any kind, or None."""
    if isinstance(module, nn.Linear):
        return LinearShape(module.in_features, module.out_features)
    if is_conv1d(module):
        rows, cols = module.get_parameter("weight").shape
        return LinearShape(int(rows), int(cols), transposed=True)
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the transposed linear layer that GPT-2 calls `Conv1D`."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and isinstance(weight, nn.Parameter) and weight.ndim == 2


def why_not(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a module cannot carry LoRA although it looks as if it could; None for mere containers."""
    if isinstance(parent, nn.MultiheadAttention) and isinstance(module, nn.Linear):
        return "nn.MultiheadAttention uses its weight without calling it, so an adapter would do nothing"
    if linear_shape(module) is not None:
        return None
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return f"{type(module).__name__} layers are not supported yet, only linear ones"
    if any(True for _ in module.children()) or not any(True for _ in module.parameters(recurse=False)):
        return None
    return f"{type(module).__name__} is not a linear layer"
