"""When LoRA counts as on a par with full fine-tuning: the rule, apart from what is measured."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.claims.claim import Holds

MARGIN = 3.0
"""Points of a task's headline metric (0…100). The paper's own differences are +2.2 (E2E) and +0.2 (WikiSQL)."""
SEEDS_NEEDED = 3
RULE = (
    f"It holds (on a par or better) if the 95 % interval of (LoRA - full fine-tuning) lies above -{MARGIN:g} points; it "
    "does not hold (worse) if that interval lies below 0 and reaches below the margin; else, with fewer than three "
    "seeds, or where full fine-tuning itself does not beat the untuned base, nothing can be said at this scale."
)


@dataclass(frozen=True)
class Compared:
    """LoRA against full fine-tuning on one task, in points; `low` and `high` bound 95 %.

    Attributes:
        base: headline of the untuned base. full: of full fine-tuning.
    """

    difference: float
    low: float
    high: float
    seeds: int
    base: float
    full: float

    @property
    def holds(self) -> Holds:
        """The rule."""
        if self.seeds < SEEDS_NEEDED or self.full <= self.base:
            return Holds.NOT_AT_THIS_SCALE
        if self.low > -MARGIN:
            return Holds.YES
        return Holds.NO if self.high < 0 else Holds.NOT_AT_THIS_SCALE
