"""Frozen linear layers for any number of rows: packed where that is faster, plain elsewhere.

On x86 a bfloat16 product with few rows is bound by reading the weight. oneDNN reads a prepacked weight
at memory speed, and a plain one at half of that or less, so the weights of a group are packed once.
The packed weight is a second copy (`packed_bytes`); it also holds the group as one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACK_ROWS_HINT = 16


class LinearGroup:
    """y_i = x @ W_iᵀ + b_i for modules that share x, as one wide output where they are packed."""

    def __init__(self, modules: Sequence[nn.Linear], *, pack: bool) -> None:
        self.modules = tuple(modules)
        self.sizes = [m.out_features for m in modules]
        self.packed: Tensor | None = None
        self.bias: Tensor | None = None
        if pack:
            self.repack()

    @property
    def packed_bytes(self) -> int:
        """Memory of the second copy."""
        return (
            0
            if self.packed is None
            else sum(m.weight.numel() * m.weight.element_size() for m in self.modules)
        )

    def repack(self) -> None:
        """Take over the modules' present weights."""
        weights = [m.weight.detach() for m in self.modules]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS_HINT)
        if any(m.bias is not None for m in self.modules):
            biases = [_bias(m) for m in self.modules]
            self.bias = torch.cat(biases)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs side by side, (n, Σ out)."""
        if self.packed is not None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return y
        outputs = [F.linear(x, m.weight, m.bias) for m in self.modules]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def can_pack(weight: Tensor) -> bool:
    """Whether this build of torch packs such weights, tried on a small one."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    try:
        small = torch.eye(32, dtype=weight.dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(small, PACK_ROWS_HINT)
        got = torch.ops.mkldnn._linear_pointwise(small, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(got, small)


def _bias(module: nn.Linear) -> Tensor:
    bias: Tensor | None = module.bias
    return module.weight.new_zeros(module.out_features) if bias is None else bias.detach()
