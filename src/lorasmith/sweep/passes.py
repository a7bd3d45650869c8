"""Which rows of which runs share a forward and backward pass of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorasmith.data import Row

PASS_SLOTS = 64
"""What starting a pass costs, in slots: a unit that would add more padding than that gets its own."""


@dataclass(frozen=True)
class Unit:
    """Rows that one run would compute in one pass alone; they are never taken apart.

    Attributes:
        run: its name. place: which of the run's passes of this step it is.
        may_pad: whether slots beyond its longest row leave its result alone.
    """

    run: str
    place: int
    rows: tuple[Row, ...]
    may_pad: bool = True

    @property
    def length(self) -> int:
        """Slots of its longest row."""
        return max(map(len, self.rows))

    @property
    def slots(self) -> int:
        """What it computes alone."""
        return self.length * len(self.rows)

    @property
    def targets(self) -> int:
        """Supervised tokens."""
        return sum(len(row.targets) for row in self.rows)


def joint_passes(units: Sequence[Unit], *, batch_tokens: int) -> list[list[Unit]]:
    """Units of one step of many runs in passes of at most `batch_tokens` slots (a larger unit has its own).

    A run's units keep their order, so its gradients add up as they would alone, and no pass holds two of them.
    """
    passes: list[list[Unit]] = []
    for place in sorted({unit.place for unit in units}):
        here: list[list[Unit]] = []
        for unit in sorted((u for u in units if u.place == place), key=lambda u: -u.length):
            if here and _fits(here[-1], unit, batch_tokens):
                here[-1].append(unit)
            else:
                here.append([unit])
        passes += here
    return passes


def _fits(others: Sequence[Unit], unit: Unit, batch_tokens: int) -> bool:
    length = others[0].length
    padding = (length - unit.length) * len(unit.rows)
    if padding and not unit.may_pad:
        return False
    return padding <= PASS_SLOTS and length * sum(len(u.rows) for u in (*others, unit)) <= batch_tokens
