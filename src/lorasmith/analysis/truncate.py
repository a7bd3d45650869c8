"""The best adapter of a lower rank, and how far two adapters are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorasmith.analysis.configs import config_for
from lorasmith.analysis.lowrank import (
    balanced,
    difference_norm,
    dtype_of,
    kept_rank,
    pair_norm,
    pair_svd,
    ratio,
    require_deltas,
    require_finite,
    require_one_cut,
    widen,
)
from lorasmith.errors import BaseMismatchError
from lorasmith.lora import Adapter, Factors


@dataclass(frozen=True, slots=True)
class RelativeError:
    """‖Δa − Δb‖_F / ‖Δa‖_F: `overall` over all modules as one vector, and by module path.

    Infinite where Δa is zero and Δb is not.
    """

    overall: float
    modules: dict[str, float]


def truncate(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> Adapter:
    """Per module, the closest delta in Frobenius norm of the given rank (Eckart–Young).

    Args:
        adapter: stays as it is. Its biases and provenance are kept.
        rank: of the result; a module that has less keeps what it has.
        energy: instead of `rank`, the least rank with Σσ² ≥ energy · total in each module. 1.0 drops
            only what is rounding: directions with a relative error below 1e-7.

    Returns:
        Factors B = U·√S, A = √S·Vh with scaling exactly 1, in the input's dtype, and a config that
        says so (`rank_pattern` and `alpha_pattern` by whole path where ranks differ).

    Raises:
        ConfigError: not exactly one of `rank` and `energy`, or factors with NaN or infinity.
    """
    require_one_cut("truncate", rank, energy)
    require_finite("truncate", {"": adapter})
    require_deltas("truncate", adapter)
    factors = {path: truncate_factors(f, rank=rank, energy=energy) for path, f in adapter.factors.items()}
    return replace(
        adapter,
        config=config_for(adapter.config, factors),
        factors=factors,
        biases={path: bias.clone() for path, bias in adapter.biases.items()},
        provenance=dict(adapter.provenance),
    )


def truncate_factors(factors: Factors, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """`truncate` for one module."""
    svd = pair_svd(widen(factors))
    kept = kept_rank(svd[1], rank=rank, energy=energy)
    made = balanced(svd, kept, dtype=dtype_of(factors), device=factors.A.device)
    return replace(made, layout=factors.layout)


def relative_error(a: Adapter, b: Adapter) -> RelativeError:
    """‖Δa − Δb‖_F / ‖Δa‖_F through the factors; a module that one side lacks counts as zero there.

    Raises:
        BaseMismatchError: a module has different shapes in the two.
        ConfigError: factors hold NaN or infinity.
    """
    require_finite("relative_error", {"a ": a, "b ": b})
    require_same_shapes("relative_error", {"a": a, "b": b})
    errors, norms = {}, {}
    for path in sorted(a.factors.keys() | b.factors.keys()):
        errors[path], norms[path] = _distance(a.factors.get(path), b.factors.get(path))
    modules = {path: ratio(errors[path], norms[path]) for path in errors}
    return RelativeError(ratio(math.hypot(*errors.values()), math.hypot(*norms.values())), modules)


def _distance(a: Factors | None, b: Factors | None) -> tuple[float, float]:
    """‖Δa − Δb‖_F and ‖Δa‖_F."""
    if a is None:
        return (0.0 if b is None else pair_norm(widen(b))), 0.0
    norm = pair_norm(widen(a))
    return (norm if b is None else difference_norm(widen(a), widen(b))), norm


def require_same_shapes(verb: str, adapters: Mapping[str, Adapter]) -> None:
    """Refuse adapters whose common modules differ in shape.

    Raises:
        BaseMismatchError: with every such module and the shapes found.
    """
    found: dict[str, dict[tuple[int, int], list[str]]] = {}
    for name, adapter in adapters.items():
        for path, f in adapter.factors.items():
            found.setdefault(path, {}).setdefault((f.out_features, f.in_features), []).append(name)
    lines = [
        f"{path}: " + ", ".join(f"{out}x{inn} in {' '.join(names)}" for (out, inn), names in shapes.items())
        for path, shapes in sorted(found.items())
        if len(shapes) > 1
    ]
    if lines:
        raise BaseMismatchError(
            f"{verb}: the adapters belong to different bases; these modules differ in shape (out x in):\n  "
            + "\n  ".join(lines)
        )
