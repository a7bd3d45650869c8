"""Which rows of which runs share a forward and backward pass of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorasmith.data import Row


@dataclass(frozen=True)
class Unit:
    """Rows that one run would compute in one pass alone; they are never taken apart.

    Attributes:
        run: its name. place: which of the run's passes of this step it is.
    """

    run: str
    place: int
    rows: tuple[Row, ...]

    @property
    def length(self) -> int:
        """Slots of its longest row."""
        return max(map(len, self.rows))

    @property
    def slots(self) -> int:
        """What it computes alone."""
        return self.length * len(self.rows)

    @property
    def branches(self) -> bool:
        """Whether attention needs a mask: some row holds more than one path."""
        return any(bool((row.ends != len(row)).any()) for row in self.rows)

    @property
    def targets(self) -> int:
        """Supervised tokens."""
        return sum(len(row.targets) for row in self.rows)


def joint_passes(units: Sequence[Unit], *, batch_tokens: int) -> list[list[Unit]]:
    """Units of one step of many runs in passes of at most `batch_tokens` slots (a larger unit has its own).

    A run's units keep their order, so its gradients add up as they would alone, and no pass holds two of them.
    Only units of one length, all with a mask or all without, share a pass: slots of padding, say, change how
    attention is cut into tiles, and with it the last bits.
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
    slots = sum(u.slots for u in (*others, unit))
    first = others[0]
    return (first.length, first.branches) == (unit.length, unit.branches) and slots <= batch_tokens
