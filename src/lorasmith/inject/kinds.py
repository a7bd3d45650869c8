"""Which modules can carry LoRA, told by what they are and never by an architecture's name."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from lorasmith.lora import LINEAR, Layout

ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d


class AdaptedLayer(nn.Module):
    """Mixed into the class of a module that an adapter changes. All that it adds is named `lora_…`."""

    lora_is_active: bool


@dataclass(frozen=True)
class LayerShape:
    """y = x @ Wᵀ + b. `transposed`: the weight is stored (in_features, out_features).

    An embedding is that product for one-hot x, a convolution for the windows of its input.
    """

    in_features: int
    out_features: int
    transposed: bool = False
    layout: Layout = LINEAR


def linear_shape(module: nn.Module) -> LayerShape | None:
    """Shape of a linear layer of any kind, or None."""
    if isinstance(module, nn.Linear):
        return LayerShape(module.in_features, module.out_features)
    if is_conv1d(module):
        rows, cols = module.get_parameter("weight").shape
        return LayerShape(int(rows), int(cols), transposed=True)
    return None


def layer_shape(module: nn.Module) -> LayerShape | None:
    """Shape of a layer of any kind that can carry LoRA, or None."""
    if isinstance(module, nn.Embedding):
        layout = Layout("embedding")
        return LayerShape(module.num_embeddings, module.embedding_dim, transposed=True, layout=layout)
    if isinstance(module, ConvNd):
        layout = Layout("conv", tuple(map(int, module.kernel_size)), module.groups)
        width = module.in_channels * math.prod(layout.kernel)
        return LayerShape(width, module.out_channels, layout=layout)
    return linear_shape(module)


def own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of the module before it was adapted."""
    return next(c for c in kind.__mro__ if issubclass(c, nn.Module) and not issubclass(c, AdaptedLayer))


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the transposed linear layer that GPT-2 calls `Conv1D`."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and isinstance(weight, nn.Parameter) and weight.ndim == 2


def why_not(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a module cannot carry LoRA although it looks as if it could; None for mere containers."""
    if isinstance(parent, nn.MultiheadAttention) and isinstance(module, nn.Linear):
        return "nn.MultiheadAttention uses its weight without calling it, so an adapter would do nothing"
    if layer_shape(module) is not None:
        return _why_not_exactly(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"{type(module).__name__} is a transposed convolution, which PEFT's format does not know"
    if any(True for _ in module.children()) or not any(True for _ in module.parameters(recurse=False)):
        return None
    if any(p.ndim == 3 for p in module.parameters(recurse=False)):
        return f"{type(module).__name__} holds stacked parameters; name them in target_parameters"
    return f"{type(module).__name__} is not a linear, embedding or convolution layer"


def _why_not_exactly(module: nn.Module) -> str | None:
    """Options of a layer under which B(A(x)) is not what its weight plus B @ A would give."""
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "max_norm rewrites the rows that a forward reads, so there is no frozen weight to adapt"
        if own_class(type(module)).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return f"{own_class(type(module)).__name__} has a forward of its own, which a low-rank term cannot follow"
    if isinstance(module, ConvNd):
        if module.padding_mode != "zeros":
            return f'padding_mode="{module.padding_mode}" does not apply to the low-rank branch in PEFT\'s format'
        if any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)):
            return "a dilated convolution has no low-rank branch in PEFT's format, whose A is never dilated"
    return None
