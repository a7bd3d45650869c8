"""DoRA as plain LoRA: the best low-rank update, and how much of DoRA's it leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lorasmith.analysis.configs import config_for
from lorasmith.analysis.dense import best_factors, residual_norm
from lorasmith.analysis.lowrank import dtype_of, ratio, require_finite
from lorasmith.errors import ConfigError, TargetError
from lorasmith.lora import Adapter, Factors, compute_dtype, dora_weight, rows_of


@dataclass(frozen=True)
class Converted:
    """An adapter of plain LoRA, and ‖Δ − scaling · B @ A‖_F / ‖Δ‖_F in all and by module path.

    Δ is what DoRA adds to the weight: a rescaling of its rows too, so of full rank as a rule.
    """

    adapter: Adapter
    relative_error: float
    modules: Mapping[str, float]


def dora_to_lora(
    adapter: Adapter,
    weights: Mapping[str, Tensor] | Callable[[str], Tensor],
    *,
    rank: int | None = None,
    transposed: Collection[str] = (),
) -> Converted:
    """Per module, the closest delta of the given rank to what DoRA adds (Eckart–Young).

    Args:
        weights: module path → W0, as a map or a function.
        rank: of the result; by default twice the adapter's own, since the row scaling needs some too.
        transposed: paths of modules whose weight is stored (in, out).

    Raises:
        ConfigError: the adapter is not DoRA, or its factors hold NaN or infinity.
        TargetError: `weights` lacks a module.
    """
    require_finite("dora_to_lora", {"": adapter})
    magnitudes = adapter.extras.magnitudes
    if not magnitudes:
        raise ConfigError("dora_to_lora: the adapter has no DoRA magnitudes; it is plain LoRA already.")
    if isinstance(weights, Mapping) and (missing := sorted(magnitudes.keys() - weights.keys())):
        raise TargetError(f"dora_to_lora: no weight for {', '.join(missing[:5])}.")
    get = weights.__getitem__ if isinstance(weights, Mapping) else weights
    factors, errors, norms = dict(adapter.factors), {}, {}
    for path, magnitude in magnitudes.items():
        f = adapter.factors[path]
        made, error, norm = _convert(get(path), f, magnitude, rank or 2 * f.rank, path in transposed)
        factors[path], errors[path], norms[path] = made, error, norm
    extras = replace(adapter.extras, magnitudes={})
    return Converted(
        replace(adapter, config=config_for(adapter.config, factors), factors=factors, extras=extras),
        ratio(math.hypot(*errors.values()), math.hypot(*norms.values())),
        {path: ratio(errors[path], norms[path]) for path in errors},
    )


def _convert(
    weight: Tensor, f: Factors, magnitude: Tensor, rank: int, transposed: bool
) -> tuple[Factors, float, float]:
    W = weight.detach().to(compute_dtype(weight.dtype))
    update = rows_of(dora_weight(W, f, magnitude, transposed=transposed) - W, transposed=transposed)
    made = best_factors(update, rank=min(rank, *update.shape), dtype=dtype_of(f))
    return replace(made, layout=f.layout), residual_norm(update, made), float(update.norm())
