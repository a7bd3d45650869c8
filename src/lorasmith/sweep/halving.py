"""Successive halving: at set steps the worse runs stop, the rest go on (arXiv 1502.07943)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorasmith.errors import ConfigError


@dataclass(frozen=True)
class Halving:
    """At each rung the best 1/`keep_one_in` of the runs go on, until one is left for the last stretch.

    With n runs of T steps the rungs stand at T/η, T/η², …, as many as it takes to come from n to one.
    """

    keep_one_in: int = 2

    def __post_init__(self) -> None:
        if (
            isinstance(self.keep_one_in, bool)
            or not isinstance(self.keep_one_in, int)
            or self.keep_one_in < 2
        ):
            raise ConfigError(
                f"halving {self.keep_one_in!r}: use a whole number of at least 2, the share that goes on is one in it."
            )

    def rungs(self, runs: int, total: int) -> list[int]:
        """Optimizer steps after which runs stop, in order."""
        count = max(0, math.ceil(math.log(runs, self.keep_one_in) - 1e-9)) if runs > 1 else 0
        steps = {round(total / self.keep_one_in**i) for i in range(1, count + 1)}
        return sorted(step for step in steps if 0 < step < total)

    def survivors(self, losses: Mapping[str, float]) -> set[str]:
        """The best 1/η, rounded up; of equal ones those that come first. A loss that is no number is the worst."""
        order = sorted(losses, key=lambda name: math.inf if math.isnan(losses[name]) else losses[name])
        return set(order[: math.ceil(len(order) / self.keep_one_in)])
