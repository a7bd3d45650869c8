"""Adapters added, subtracted and merged, with the error stated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, get_args

import torch

from lorasmith.analysis.configs import config_for
from lorasmith.analysis.dense import best_factors, frobenius_norm, residual_norm
from lorasmith.analysis.elementwise import dare, ties
from lorasmith.analysis.lowrank import (
    CANCELLATION_NOISE,
    Pair,
    balanced,
    difference_norm,
    dtype_of,
    norm,
    numerical_rank,
    pair_norm,
    pair_svd,
    ratio,
    require_finite,
    stack,
    widen,
)
from lorasmith.analysis.truncate import require_same_shapes
from lorasmith.errors import ConfigError, did_you_mean
from lorasmith.lora import Adapter, Factors, LoRAConfig, compute_dtype, delta, generator_for

Method = Literal["sum", "concat", "svd", "ties", "dare"]
# TIES keeps the top 20 % (arXiv 2306.01708, §4). DARE drops up to 90 % from full fine-tunes; truncation
# to a low rank sees what is dropped as noise of energy 1/density − 1, which is 1 at one half.
_DENSITY = {"ties": 0.2, "dare": 0.5}
_RANKED = ("svd", "ties", "dare")


@dataclass(frozen=True, slots=True)
class Combined:
    """What `combine` made.

    Attributes:
        adapter: the result, scaling 1 in every module.
        relative_error: ‖target − result‖_F / ‖target‖_F over all modules, measured on the stored factors.
            The target is the weighted sum; for `ties` and `dare`, what these rules give before truncation.
        rank: the largest over the modules.
    """

    adapter: Adapter
    relative_error: float
    rank: int


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter's share in one module."""

    index: int
    weight: float
    factors: Factors


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: Method = "sum",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Combined:
    """Σ wᵢ·Δᵢ, or a merge of the Δᵢ, as one adapter.

    Args:
        adapters: need not cover the same modules; a missing one counts as zero.
        weights: one each; 1 for all by default.
        method: `"concat"` stacks the factors: rank Σrᵢ, only the rounding of w·scaling·B.
            `"sum"` is the same sum, brought to its numerical rank through QR: no larger than
            `concat`, smaller where the adapters share directions or cancel, balanced, lossless to rounding.
            `"svd"` is the best approximation of that sum of rank `rank`.
            `"ties"` and `"dare"` work on elements: they form the deltas of one module at a time,
            then truncate to `rank`. For TIES equal weights of 1 give the paper's mean.
        rank: for `svd`, `ties`, `dare`; by default the largest rank among the adapters.
        density: share of elements kept, for `ties` (0.2 by default) and `dare` (0.5).
        seed: of DARE's dropping; each adapter and module has its own stream.
        progress: called with (modules done, modules in all, path) before each.

    Raises:
        ConfigError: options that do not fit, biases, NaN or infinity.
        BaseMismatchError: a module has different shapes in two adapters.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    _check(adapters, weights, method, rank, density)
    named = {f"adapters[{i}] ": adapter for i, adapter in enumerate(adapters)}
    require_finite("combine", named)
    require_same_shapes("combine", {name.strip(): adapter for name, adapter in named.items()})
    rank = rank or max(f.rank for adapter in adapters for f in adapter.factors.values())
    density = density if density is not None else _DENSITY.get(method, 1.0)
    factors, errors, sizes = {}, [], []
    by_path = _by_path(adapters, weights)
    for done, (path, parts) in enumerate(by_path.items()):
        if progress is not None:
            progress(done, len(by_path), path)
        if method in ("ties", "dare"):
            generators = [generator_for(seed, f"dare/{part.index}/{path}") for part in parts]
            made, error, size = _merge_elements(parts, method, rank, density, generators)
        else:
            made, error, size = _add(parts, method, rank)
        factors[path] = replace(made, layout=parts[0].factors.layout)
        errors.append(error)
        sizes.append(size)
    return Combined(
        adapter=Adapter(
            config=config_for(_shared_config(adapters, factors), factors),
            factors=factors,
            provenance=_shared_provenance(adapters),
        ),
        relative_error=ratio(math.hypot(*errors), math.hypot(*sizes)),
        rank=max(f.rank for f in factors.values()),
    )


def subtract(a: Adapter, b: Adapter) -> Adapter:
    """Δa − Δb, exactly: `combine([a, b], [1, -1])` at its numerical rank."""
    return combine([a, b], [1.0, -1.0], method="sum").adapter


def _add(parts: Sequence[_Part], method: str, rank: int) -> tuple[Factors, float, float]:
    """The factors of Σ wᵢ·Δᵢ, their distance from it, and its norm."""
    pairs = [widen(part.factors) for part in parts]
    weights = [part.weight for part in parts]
    total = stack(pairs, weights)
    noise = CANCELLATION_NOISE * max(abs(w) * norm(p) for w, p in zip(weights, pairs, strict=True))
    if method == "concat":
        made, size = _narrow(total, parts), pair_norm(total)
    else:
        made, size = _recompress(total, parts, noise, None if method == "sum" else rank)
    error = difference_norm(total, widen(made))
    return made, error if error > noise else 0.0, size


def _recompress(total: Pair, parts: Sequence[_Part], noise: float, rank: int | None) -> tuple[Factors, float]:
    U, S, Vh = pair_svd(total)
    dtype = _dtype(parts)
    used = numerical_rank(S, dtype, noise=noise)
    size = float(S.norm().item())
    S[used:] = 0  # what cancelled is zero, not rounding noise
    kept = min(max(used, 1), rank or used or 1)
    return balanced((U, S, Vh), kept, dtype=dtype, device=parts[0].factors.A.device), size


def _narrow(pair: Pair, parts: Sequence[_Part]) -> Factors:
    (sB, A), dtype, device = pair, _dtype(parts), parts[0].factors.A.device
    return Factors(A.to(device, dtype), sB.to(device, dtype), 1.0)


def _merge_elements(
    parts: Sequence[_Part],
    method: str,
    rank: int,
    density: float,
    generators: Sequence[torch.Generator],
) -> tuple[Factors, float, float]:
    dtype, device = _dtype(parts), parts[0].factors.A.device
    deltas = [delta(part.factors, dtype=compute_dtype(dtype)).to(device) for part in parts]
    weights = [part.weight for part in parts]
    if method == "ties":
        target = ties(deltas, weights=weights, density=density)
    else:
        target = dare(deltas, weights=weights, density=density, generators=generators)
    made = best_factors(target, rank=min(rank, *target.shape), dtype=dtype)
    return made, residual_norm(target, made), frobenius_norm(target)


def _by_path(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[_Part]]:
    parts: dict[str, list[_Part]] = {}
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for path, factors in adapter.factors.items():
            parts.setdefault(path, []).append(_Part(index, weight, factors))
    return parts


def _dtype(parts: Sequence[_Part]) -> torch.dtype:
    return reduce(torch.promote_types, (dtype_of(part.factors) for part in parts))


def _shared_config(adapters: Sequence[Adapter], factors: dict[str, Factors]) -> LoRAConfig:
    """The first adapter's config where all chose the same modules, else one that names each module."""
    first = replace(adapters[0].config, bias="none")
    choices = {(a.config.targets, a.config.exclude, a.config.layers) for a in adapters}
    if len(choices) == 1:
        return first
    return replace(first, targets=tuple(sorted(factors)), exclude=(), layers=None)


def _shared_provenance(adapters: Sequence[Adapter]) -> dict[str, object]:
    first, *others = (adapter.provenance for adapter in adapters)
    return {key: value for key, value in first.items() if all(o.get(key) == value for o in others)}


def _check(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float | None,
) -> None:
    faults = []
    if not any(adapter.factors for adapter in adapters):
        faults.append("there is no adapter with factors to combine")
    if len(weights) != len(adapters):
        faults.append(f"{len(weights)} weights for {len(adapters)} adapters: give one each")
    if not all(math.isfinite(w) for w in weights):
        faults.append(f"weights={list(weights)}: use finite numbers")
    if method not in get_args(Method):
        faults.append(
            f"method={method!r} is unknown: use {', '.join(get_args(Method))}."
            + did_you_mean(method, get_args(Method))
        )
    if rank is not None and method not in _RANKED:
        faults.append(
            f'rank={rank} with method="{method}", which is exact: use method="svd" to limit the rank'
        )
    elif rank is not None and (not isinstance(rank, int) or rank < 1):
        faults.append(f"rank={rank}: use a whole number of at least 1")
    if density is not None and method not in _DENSITY:
        faults.append(f'density={density} with method="{method}": only ties and dare have one')
    elif density is not None and not 0 < density <= 1:
        faults.append(f"density={density}: use a share above 0 and up to 1")
    biased = [f"adapters[{i}]" for i, adapter in enumerate(adapters) if adapter.biases]
    if biased:
        faults.append(
            f"{', '.join(biased)} carry trained biases, which replace the base's and so have no sum: "
            "clear `.biases` to combine the factors alone"
        )
    extra = [f"adapters[{i}] ({adapter.extras})" for i, adapter in enumerate(adapters) if adapter.extras]
    if extra:
        faults.append(
            f"{', '.join(extra)} hold more than factors, which has no sum: clear `.extras` to combine the factors "
            "alone, or convert DoRA with dora_to_lora"
        )
    if faults:
        raise ConfigError("combine:\n  " + "\n  ".join(faults))
