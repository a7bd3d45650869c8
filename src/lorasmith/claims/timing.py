"""Times of arms that take turns, and the ratio of two of them with its bootstrap interval."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

Arm = Callable[[], AbstractContextManager[Callable[[], object]]]
"""Brings about a state of the model; inside, what it yields is timed."""

RESAMPLES, VISIT_S, PASSES, LONG_S = 4000, 0.08, 5, 0.3


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios, and the interval of that median."""

    median: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """high − low."""
        return self.high - self.low

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleaved(
    arms: Mapping[str, Arm], *, seconds: float, least: int = 6, most: int = 100
) -> dict[str, list[float]]:
    """Seconds of each arm, one number a round; every round visits every arm, each time another one first.

    A visit runs once untimed where a run is short, then up to five times, of which the median counts. So slow
    changes of the machine fall on all arms alike, and short ones on few rounds.

    Args:
        seconds: no round begins after this time, once `least` are done.
        most: rounds at most.
    """
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in arms}
    started = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - started > seconds:
            break
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            with arms[name]() as run:
                times[name].append(_visit(run))
    return times


def _visit(run: Callable[[], object]) -> float:
    first = _timed(run)
    if first > LONG_S:
        return first
    return statistics.median(_timed(run) for _ in range(max(1, min(PASSES, int(VISIT_S / first)))))


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def ratio(times: Sequence[float], to: Sequence[float], *, confidence: float = 0.95) -> Ratio:
    """times / to, round by round: the median, and its percentile bootstrap over the rounds."""
    ratios = np.asarray(times) / np.asarray(to)
    drawn = np.random.default_rng(0).choice(ratios, size=(RESAMPLES, len(ratios)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def conditions() -> dict[str, object]:
    """What times depend on besides what is timed."""
    return {"threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 2)}
