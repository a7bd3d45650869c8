"""Mean, spread, and the paired bootstrap over test items."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Items = NDArray[np.float64]
"""(items, k): numbers of each test item, from whose sums over items a score is computed."""
RESAMPLES = 2000
CONFIDENCE = 0.95


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation with n - 1; None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_bootstrap(
    ours: Sequence[Items], theirs: Sequence[Items], score: Callable[[Any], float], *, seed: int = 0
) -> tuple[float, float, float]:
    """Mean score of `ours` minus that of `theirs`, over their seeds, and its 95 % interval.

    Each resample draws test items with replacement, the same ones for every run of both. So the interval
    says how the difference depends on the items asked; what depends on the seed is beside it, as a spread.

    Args:
        ours, theirs: for each seed, its items, all of the same test set.
    """
    runs = np.stack([*ours, *theirs])
    generator = np.random.default_rng(seed)

    def difference(sums: Items) -> float:
        scores = [score(row) for row in sums]
        return statistics.fmean(scores[: len(ours)]) - statistics.fmean(scores[len(ours) :])

    items = runs.shape[1]
    drawn = generator.multinomial(items, np.full(items, 1 / items), size=RESAMPLES).astype(np.float64)
    sums = np.einsum("bi,rik->brk", drawn, runs)
    found = np.array([difference(each) for each in sums])
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return difference(runs.sum(1)), float(low), float(high)
