"""From the returns of every run to the numbers that answer the question."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lorasmith.recipes.pixels.settings import Arm, Settings

EPISODES = 100  # the measure: mean return over the last so many
BINS = 50


@dataclass(frozen=True)
class Margin:
    """How far one arm is above another.

    Attributes:
        difference: of the means over seeds.
        standard_error: of that difference, each arm with its own variance (Welch); one seed has none.
        worst_above_best: whether the arm's worst seed is above the other's best.
    """

    difference: float
    standard_error: float | None
    worst_above_best: bool

    @property
    def holds(self) -> bool:
        """Above by more than two standard errors, and in every pair of seeds."""
        error = self.standard_error
        return error is not None and self.worst_above_best and self.difference > 2 * error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "holds": self.holds}


def margin(ours: Sequence[float], theirs: Sequence[float]) -> Margin:
    """Compare two arms by the result of each of their seeds."""
    error = None
    if min(len(ours), len(theirs)) > 1:
        error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (ours, theirs)))
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    return Margin(difference, error, min(ours) > max(theirs))


def last_return(result: Mapping[str, Any]) -> float:
    """Mean return over a run's last 100 episodes."""
    return statistics.fmean(result["returns"][-EPISODES:])


def curve(results: Sequence[Mapping[str, Any]], steps: int) -> dict[str, list[float | None]]:
    """Mean return of the episodes that ended in each of 50 spans of the run: mean, lowest, highest seed."""
    edges = np.linspace(0, steps, BINS + 1)
    by_seed = np.array([_binned(r["at_step"], r["returns"], edges) for r in results])
    known = ~np.isnan(by_seed).any(0)
    shown = {"mean": by_seed.mean(0), "low": by_seed.min(0), "high": by_seed.max(0)}
    lines = {name: [float(v) if k else None for v, k in zip(values, known, strict=True)]
             for name, values in shown.items()}  # fmt: skip
    return {"step": [float(x) for x in (edges[:-1] + edges[1:]) / 2], **lines}


def _binned(at_step: Sequence[int], returns: Sequence[float], edges: Any) -> Any:
    sums, _ = np.histogram(at_step, edges, weights=returns)
    counts, _ = np.histogram(at_step, edges)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def summarise(
    settings: Settings,
    sights: Sequence[Mapping[str, Any]],
    results: Mapping[Arm, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Everything that the figure and the docs say, as plain values.

    Args:
        sights: what phase one measured, seed by seed.
        results: what phase two measured, for each arm seed by seed.
    """
    chance = [statistics.fmean(sight["random_returns"]) for sight in sights]
    frozen = [last_return(r) for r in results[Arm("frozen")]]
    rows = [_row(arm, found, settings, frozen, chance) for arm, found in results.items()]
    adapted = [row for row in rows if row["name"].startswith("lora")]
    return {
        "settings": settings.to_dict(),
        "random": {"last_returns": chance, "mean": statistics.fmean(chance)},
        "autoencoders": [{key: sight[key] for key in ("seed", "loss", "pixel_variance")} for sight in sights],
        "arms": rows,
        "lora_above_frozen": all(row["above_frozen"]["holds"] for row in adapted),
        "lora_above_random": all(row["above_random"]["holds"] for row in adapted),
        "cpu_s": sum(r["cpu_s"] for found in (sights, *results.values()) for r in found),
    }


def _row(
    arm: Arm,
    found: Sequence[Mapping[str, Any]],
    settings: Settings,
    frozen: Sequence[float],
    chance: Sequence[float],
) -> dict[str, Any]:
    last = [last_return(r) for r in found]
    return {
        "name": arm.name, "label": arm.label,
        "encoder_params_trained": found[0]["encoder_params_trained"],
        "last_returns": last, "mean": statistics.fmean(last),
        "deviation": statistics.stdev(last) if len(last) > 1 else 0.0,
        "episodes": [len(r["returns"]) for r in found],
        "above_frozen": margin(last, frozen).to_dict(), "above_random": margin(last, chance).to_dict(),
        "curve": curve(found, settings.steps),
    }  # fmt: skip
