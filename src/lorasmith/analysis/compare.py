"""How alike two adapters are (paper §7.2), through their factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lorasmith.analysis.lowrank import (
    difference_norm,
    dtype_of,
    inner,
    norm,
    numerical_rank,
    pair_norm,
    pair_svd,
    ratio,
    require_finite,
    widen,
)
from lorasmith.analysis.truncate import require_same_shapes
from lorasmith.errors import ConfigError, TargetError, did_you_mean
from lorasmith.lora import Adapter, Factors

Side = Literal["right", "left"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two deltas of one module; where a side lacks it, its delta is zero.

    Attributes:
        cosine: ⟨Δa, Δb⟩ / (‖Δa‖·‖Δb‖); None where a delta is zero.
        norm_a: ‖Δa‖_F.
        norm_b: ‖Δb‖_F.
        relative_difference: ‖Δa − Δb‖_F / ‖Δa‖_F.
        top_overlap: φ of the first right singular directions (i = j = 1); None where a delta is zero.
    """

    cosine: float | None
    norm_a: float
    norm_b: float
    relative_difference: float
    top_overlap: float | None


def subspace_overlap(U: Tensor, V: Tensor, i: int, j: int) -> float:
    """φ = ‖U_iᵀ·V_j‖_F² / min(i, j): 1 where one span holds the other, 0 where they are orthogonal.

    Paper §7.2, in the form that follows from its definitions (its appendix prints 1 − d² without the 1/p).

    Args:
        U: (n, p) with orthonormal columns, the leading direction first.
        V: (n, q), the same.
        i: how many columns of U.
        j: how many columns of V.

    Raises:
        ConfigError: i or j is not between 1 and the number of columns.
    """
    if not (1 <= i <= U.shape[1] and 1 <= j <= V.shape[1]):
        raise ConfigError(
            f"subspace_overlap: i={i}, j={j} of {U.shape[1]} and {V.shape[1]} directions: start at 1"
        )
    return (U[:, :i].T @ V[:, :j]).double().square().sum().item() / min(i, j)


def overlap_grid(a: Adapter, b: Adapter, path: str, *, side: Side = "right") -> Tensor:
    """φ(i, j) of the singular directions of Δa and Δb at `path`, at [i − 1, j − 1].

    Only directions that exceed rounding take part, so a delta of numerical rank k has k of them.
    Right directions of a briefly trained adapter lie near the span of A's start: compare adapters
    whose A was drawn from different seeds, or look at `"left"`.

    Raises:
        TargetError: an adapter has nothing at `path`.
        BaseMismatchError: the two differ in shape there.
        ConfigError: factors hold NaN or infinity.
    """
    fa, fb = _factors_at(a, path), _factors_at(b, path)
    pair = {"a ": replace(a, factors={path: fa}), "b ": replace(b, factors={path: fb})}
    require_finite("overlap_grid", pair)
    require_same_shapes("overlap_grid", pair)
    squares = (_directions(fa, side).T @ _directions(fb, side)).square()
    i = torch.arange(1, squares.shape[0] + 1)[:, None]
    j = torch.arange(1, squares.shape[1] + 1)[None, :]
    grid = squares.cumsum(0).cumsum(1) / torch.minimum(i, j)
    return grid.to(torch.promote_types(dtype_of(fa), dtype_of(fb)))


def compare(a: Adapter, b: Adapter) -> dict[str, Comparison]:
    """Module path → `Comparison`, for every module that either has.

    Raises:
        BaseMismatchError: a module has different shapes in the two.
        ConfigError: factors hold NaN or infinity.
    """
    require_finite("compare", {"a ": a, "b ": b})
    require_same_shapes("compare", {"a": a, "b": b})
    paths = sorted(a.factors.keys() | b.factors.keys())
    return {path: _compare(a.factors.get(path), b.factors.get(path)) for path in paths}


def cosine(a: Adapter, b: Adapter) -> float | None:
    """⟨Δa, Δb⟩ / (‖Δa‖·‖Δb‖) over all modules as one vector; None where a delta is zero.

    Raises:
        BaseMismatchError: a module has different shapes in the two.
        ConfigError: factors hold NaN or infinity.
    """
    require_finite("cosine", {"a ": a, "b ": b})
    require_same_shapes("cosine", {"a": a, "b": b})
    wide_a, wide_b = ({path: widen(f) for path, f in x.factors.items()} for x in (a, b))
    product = sum(inner(wide_a[path], wide_b[path]) for path in wide_a.keys() & wide_b.keys())
    sizes = math.hypot(*map(norm, wide_a.values())) * math.hypot(*map(norm, wide_b.values()))
    return product / sizes if sizes else None


def _compare(a: Factors | None, b: Factors | None) -> Comparison:
    norm_a = 0.0 if a is None else pair_norm(widen(a))
    norm_b = 0.0 if b is None else pair_norm(widen(b))
    if a is None or b is None or norm_a == 0 or norm_b == 0:
        return Comparison(None, norm_a, norm_b, ratio(max(norm_a, norm_b), norm_a), None)
    wide_a, wide_b = widen(a), widen(b)
    return Comparison(
        cosine=inner(wide_a, wide_b) / (norm_a * norm_b),
        norm_a=norm_a,
        norm_b=norm_b,
        relative_difference=difference_norm(wide_a, wide_b) / norm_a,
        top_overlap=subspace_overlap(_directions(a, "right"), _directions(b, "right"), 1, 1),
    )


def _directions(factors: Factors, side: Side) -> Tensor:
    """Orthonormal columns (n, k), k the numerical rank, float64."""
    U, S, Vh = pair_svd(widen(factors))
    used = numerical_rank(S, dtype_of(factors))
    return U[:, :used] if side == "left" else Vh[:used].T


def _factors_at(adapter: Adapter, path: str) -> Factors:
    if path not in adapter.factors:
        raise TargetError(
            f"overlap_grid: no factors at {path!r} among {len(adapter.factors)} modules."
            + did_you_mean(path, adapter.factors)
        )
    return adapter.factors[path]
