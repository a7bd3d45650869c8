"""When LoRA counts as on a par with full fine-tuning: the rule, apart from what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorasmith.claims.claim import Holds

MARGIN = 3.0
"""Points of a task's headline metric (0…100). The paper's own differences are +2.2 (E2E) and +0.2 (WikiSQL)."""
SEEDS_NEEDED = 3
RULE = (
    f"On a par or better: the 95 % interval of (LoRA - full fine-tuning) lies above -{MARGIN:g} points. "
    "Worse: it lies below 0 and reaches below that. The claim holds if every task is on a par or better, does not "
    "hold if one is worse, and is undecided at this scale otherwise, with fewer than three seeds, or where full "
    "fine-tuning itself does not beat the untuned base."
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
    def finding(self) -> str:
        """ "on a par or better", "worse" or "undecided"."""
        if self.seeds < SEEDS_NEEDED or self.full <= self.base:
            return "undecided"
        if self.low > -MARGIN:
            return "on a par or better"
        return "worse" if self.high < 0 else "undecided"


def verdict(tasks: Mapping[str, Compared], asked: Sequence[str]) -> Holds:
    """The rule over the tasks that were asked for; one that was not measured leaves it undecided."""
    findings = [tasks[name].finding if name in tasks else "undecided" for name in asked]
    if "worse" in findings:
        return Holds.NO
    return Holds.YES if set(findings) == {"on a par or better"} else Holds.NOT_AT_THIS_SCALE
