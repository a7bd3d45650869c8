"""How large an adapter must be: by the data's information, by truncation, by the intrinsic dimension.

Three tiers, cheapest first. Capacity is an upper bound on need, from one forward pass; the truncation
curve says what one training run really used; the intrinsic dimension counts the numbers needed at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from lorasmith.analysis.truncate import truncate
from lorasmith.errors import ConfigError
from lorasmith.lora import Adapter

BITS_PER_PARAM = 2.0
"""What a trained number stores (Allen-Zhu & Li; used so by Schulman et al., LoRA Without Regret)."""


@dataclass(frozen=True)
class Capacity:
    """⌈bits / (2 · parameters of one unit of rank)⌉, at least 1.

    Attributes:
        bits: −Σ log2 p of the completion tokens under the base: what there is to learn at most.
        params_per_rank: Σ (in + out) over the targets.
        exact_rank: before rounding up.
    """

    bits: float
    params_per_rank: int
    exact_rank: float
    rank: int

    def __str__(self) -> str:
        return (
            f"{self.bits:,.0f} bits / ({BITS_PER_PARAM:g} bits · {self.params_per_rank:,} parameters per unit of "
            f"rank) = {self.exact_rank:.2g}, so rank {self.rank} holds them"
        )


def capacity(nats: float, params_per_rank: int) -> Capacity:
    """Capacity rank of data whose completion tokens cost the base `nats` in all."""
    bits = nats / math.log(2)
    exact = bits / (BITS_PER_PARAM * params_per_rank)
    return Capacity(bits, params_per_rank, exact, max(1, math.ceil(exact)))


@dataclass(frozen=True)
class Truncation:
    """Loss of an adapter truncated to each rank, and the least rank that keeps 90 % and 99 % of its gain.

    `r90` and `r99` are None where the adapter gained nothing.
    """

    base_loss: float
    losses: Mapping[int, float]
    r90: int | None
    r99: int | None

    def kept(self, rank: int) -> float:
        """Share of the gain that this rank keeps."""
        full = self.base_loss - self.losses[max(self.losses)]
        return (self.base_loss - self.losses[rank]) / full if full > 0 else math.nan


def truncation_curve(
    adapter: Adapter,
    evaluate: Callable[[Adapter], float],
    *,
    base_loss: float,
    ranks: Sequence[int] | None = None,
) -> Truncation:
    """Evaluate the best adapter of rank 1, 2, 4, … in each module (Eckart–Young), up to the full one.

    Args:
        evaluate: loss of the base with an adapter on, lower is better.
        base_loss: loss without one.
    """
    full = max(f.rank for f in adapter.factors.values())
    chosen = sorted({r for r in (ranks or _powers(full)) if r <= full} | {full})
    losses = {r: evaluate(adapter if r == full else truncate(adapter, rank=r)) for r in chosen}
    curve = Truncation(base_loss, losses, None, None)
    return Truncation(base_loss, losses, _least(curve, 0.90), _least(curve, 0.99))


def _powers(top: int) -> list[int]:
    return [1 << k for k in range(max(1, top).bit_length()) if 1 << k <= top]


def _least(curve: Truncation, share: float) -> int | None:
    # Once a rank keeps enough, every larger one should too; noise above it does not move the answer.
    return next((r for r in sorted(curve.losses) if curve.kept(r) >= share), None)


@dataclass(frozen=True)
class Dimension:
    """`d90`: least tried dimension whose median run keeps 90 % of the gain; None where none did."""

    d90: int | None
    gains: Mapping[int, tuple[float, ...]]


def intrinsic_dimension(
    run: Callable[[int, int], float],
    *,
    base_loss: float,
    target_loss: float,
    dimensions: Sequence[int],
    seeds: int = 3,
    share: float = 0.9,
) -> Dimension:
    """d90 by bisection over `dimensions` (Li et al. 2018), each tried with several random projections.

    Args:
        run: (dimension, seed) → loss reached by training in that many dimensions.
        target_loss: loss of the unrestricted adapter.

    Raises:
        ConfigError: the unrestricted adapter gained nothing, so there is nothing to measure against.
    """
    if not target_loss < base_loss:
        raise ConfigError(
            f"intrinsic dimension: training brought the loss from {base_loss:.4g} to {target_loss:.4g}, so there is "
            "no gain to keep 90 % of. Train longer or at another learning rate."
        )
    grid = sorted(set(dimensions))
    gains: dict[int, tuple[float, ...]] = {}

    def keeps(d: int) -> bool:
        if d not in gains:
            gains[d] = tuple((base_loss - run(d, s)) / (base_loss - target_loss) for s in range(seeds))
        return median(gains[d]) >= share

    low, high = 0, len(grid)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(grid[middle]) else (middle + 1, high)
    return Dimension(grid[low] if low < len(grid) else None, dict(sorted(gains.items())))


@dataclass(frozen=True)
class RateRange:
    """A learning-rate range test.

    Attributes:
        suggested: a third of the rate at which the smoothed loss was lowest.
        lowest_at: that rate. diverged_at: where the loss had doubled its fall, or None.
    """

    suggested: float
    lowest_at: float
    diverged_at: float | None


def rate_range(rates: Sequence[float], losses: Sequence[float], *, keep: float = 0.7) -> RateRange:
    """Read a range test: the rate rises geometrically from step to step (Smith 2017).

    At the lowest smoothed loss the rate is already about to be too high; a third of it is safe for a whole run.

    Raises:
        ConfigError: fewer than five steps, or the loss never fell.
    """
    if len(rates) != len(losses) or len(rates) < 5:
        raise ConfigError(
            f"range test: {len(rates)} rates and {len(losses)} losses; use at least five of both."
        )
    smooth, mean = [], 0.0
    for i, loss in enumerate(losses, 1):
        mean = keep * mean + (1 - keep) * (loss if math.isfinite(loss) else 1e6)
        smooth.append(mean / (1 - keep**i))
    best = min(range(len(smooth)), key=smooth.__getitem__)
    if best == 0:
        raise ConfigError("range test: the loss rose from the first step on; start at a lower rate.")
    worst = next((i for i in range(best, len(smooth)) if smooth[i] > smooth[0]), None)
    suggested = float(f"{rates[best] / 3:.2g}")
    return RateRange(suggested, rates[best], None if worst is None else rates[worst])
