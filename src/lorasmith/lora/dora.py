"""DoRA (arXiv 2402.09353): the weight m · V / ‖V‖, row by row, with V = W0 + scaling · B @ A."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lorasmith.lora.delta import compute_dtype, delta
from lorasmith.lora.factors import Factors


def dora_weight(W: Tensor, factors: Factors, magnitude: Tensor, *, transposed: bool = False) -> Tensor:
    """m · V / ‖V‖ in at least float32, rounded once to W's dtype, in W's own shape.

    Args:
        magnitude: m, shape (out_features,).
        transposed: W is stored (in_features, out_features); the rows above are then its columns.
    """
    wide = compute_dtype(W.dtype)
    V = rows_of(W, transposed=transposed).to(wide) + delta(factors.to(W.device), dtype=wide)
    merged: Tensor = V * (magnitude.to(W.device, wide) / V.norm(dim=1))[:, None]
    return (merged.T if transposed else merged).reshape(W.shape).to(W.dtype)


def rows_of(W: Tensor, *, transposed: bool = False) -> Float[Tensor, "out_features in_features"]:
    """The weight as (out_features, in_features), whatever a layer stores; kernels count as inputs."""
    return W.T if transposed else W.flatten(1)
