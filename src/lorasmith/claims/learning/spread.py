"""How much of a difference between arms is chance, from runs that differ in their seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lorasmith.claims.claim import Holds


@dataclass(frozen=True)
class Spread:
    """Standard deviation of one run around its arm's mean, from all arms together.

    `freedom`: how many deviations it rests on; with none, `sd` says nothing.
    """

    sd: float
    freedom: int


@dataclass(frozen=True)
class Interval:
    """A difference and half the width of its 95 % confidence interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}" if math.isfinite(self.half) else f"{self.mean:+.3f} ± ?"


def pooled(arms: Iterable[Sequence[float]]) -> Spread:
    """√(Σ (x − mean of its arm)² / Σ (n − 1))."""
    finite = [[x for x in arm if math.isfinite(x)] for arm in arms]
    used = [arm for arm in finite if len(arm) > 1]
    freedom = sum(len(arm) - 1 for arm in used)
    squares = sum((x - fmean(arm)) ** 2 for arm in used for x in arm)
    return Spread(math.sqrt(squares / freedom) if freedom else math.inf, freedom)


def difference(a: Sequence[float], b: Sequence[float], spread: Spread) -> Interval:
    """mean(a) − mean(b), with the spread that all arms have in common (Student's t)."""
    width = spread.sd * math.sqrt(1 / len(a) + 1 / len(b))
    return Interval(fmean(a) - fmean(b), width * t_quantile(spread.freedom) if spread.freedom else math.inf)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of `values` with its own 95 % confidence interval."""
    spread = pooled([values])
    half = spread.sd / math.sqrt(len(values)) * t_quantile(spread.freedom) if spread.freedom else math.inf
    return Interval(fmean(values), half)


def below(interval: Interval, limit: float) -> Holds:
    """Whether the true difference lies below `limit`: yes, no, or the interval holds both."""
    if interval.high < limit:
        return Holds.YES
    return Holds.NO if interval.low > limit else Holds.NOT_AT_THIS_SCALE


def all_of(*verdicts: Holds) -> Holds:
    """Yes if each is; no if one is; else it cannot be told."""
    for deciding in (Holds.NO, Holds.NOT_AT_THIS_SCALE):
        if deciding in verdicts:
            return deciding
    return Holds.YES


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t (exact for 1 and 2; else Abramowitz & Stegun 26.7.5, within 0.5 %)."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, n = 1.959963985, freedom
    terms = (
        z,
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4),
    )
    return sum(terms)
