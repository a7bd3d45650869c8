"""delta = scaling · B @ A, and W0 + delta with a single rounding."""

from __future__ import annotations

from dataclasses import replace

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
    weight: Float[Tensor, "rows cols *kernel"],
    factors: Factors,
    *,
    transposed: bool = False,
    out: Float[Tensor, "rows cols *kernel"] | None = None,
    scratch: Tensor | None = None,
) -> Float[Tensor, "rows cols *kernel"]:
    """W0 + scaling · B @ A in at least float32, rounded once to W0's dtype. W0 is not changed.

    Args:
        weight: W0, (out_features, in_features), or its transpose when `transposed`. Further axes,
            those of a convolution's kernel, count as part of in_features.
        transposed: the weight is stored (in_features, out_features), as GPT-2's `Conv1D` does.
        out: where the result goes, of W0's shape and dtype; a new tensor by default.
        scratch: room for the sum before it is rounded: as many elements of `compute_dtype` as W0 has.
            Reused over many weights, it stays in the cache.
    """
    wide = compute_dtype(weight.dtype)
    A = factors.A.to(weight.device, wide)
    # Rank-major in memory: MKL takes a tall matrix of few columns faster so, with the same bits.
    sB = (factors.B.T.to(weight.device, wide).contiguous() * factors.scaling).T
    left, right = (A.T, sB.T) if transposed else (sB, A)
    out = torch.empty_like(weight) if out is None else out
    matrix = weight.flatten(1)
    is_direct = wide == out.dtype and (out.ndim == 2 or out.is_contiguous())
    if is_direct:
        total = out.view(matrix.shape)
    elif scratch is None or scratch.dtype != wide:
        total = torch.empty(matrix.shape, dtype=wide, device=weight.device)
    else:
        total = scratch[: weight.numel()].view(matrix.shape)
    total.copy_(matrix).addmm_(left, right)  # in place, so that autocast leaves it in `wide`
    return out if is_direct else out.copy_(total.view(weight.shape))


def factors_of_rows(factors: Factors, rows: slice, *, transposed: bool = False) -> Factors:
    """The factors whose delta is those rows of the delta, as the weight is stored."""
    if transposed:
        return replace(factors, A=factors.A[:, rows])
    return replace(factors, B=factors.B[rows])
