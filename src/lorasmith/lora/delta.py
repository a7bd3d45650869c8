"""delta = scaling · B @ A, and W0 + delta with a single rounding."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lorasmith.lora.factors import Factors


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 weights, else float32: where a sum is formed before it is rounded."""
    return torch.promote_types(dtype, torch.float32)


def delta(
    factors: Factors, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "out_features in_features"]:
    """scaling · B @ A, formed in `dtype`."""
    return (factors.B.to(dtype) * factors.scaling) @ factors.A.to(dtype)


def add_delta(
    weight: Float[Tensor, "rows cols *kernel"], factors: Factors, *, transposed: bool = False
) -> Float[Tensor, "rows cols *kernel"]:
    """W0 + scaling · B @ A in at least float32, rounded once to W0's dtype. W0 is not changed.

    Args:
        weight: W0, (out_features, in_features), or its transpose when `transposed`. Further axes,
            those of a convolution's kernel, count as part of in_features.
        transposed: the weight is stored (in_features, out_features), as GPT-2's `Conv1D` does.
    """
    wide = compute_dtype(weight.dtype)
    A = factors.A.to(weight.device, wide)
    sB = factors.B.to(weight.device, wide) * factors.scaling
    left, right = (A.T, sB.T) if transposed else (sB, A)
    matrix = weight if weight.ndim == 2 else weight.flatten(1)
    return torch.addmm(matrix.to(wide), left, right).to(weight.dtype).view_as(weight)
