"""The runs of a sweep over the processes of torchrun: which are whose, and how they are compared.

Each process trains its own runs at its own pace. They meet only where halving compares them, through a table of
keys that all see, and at the end; so a process that was started again may be rounds behind the others.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lorasmith.errors import ConfigError
from lorasmith.sweep.grid import Point
from lorasmith.train import World, wait_for


def names_of(points: Sequence[Point], world: World) -> set[str]:
    """The runs of this process. Those with the same rows, which can share passes, stay together.

    Raises:
        ConfigError: there are fewer runs than processes.
    """
    if len(points) < world.size:
        raise ConfigError(
            f"{len(points)} runs on {world.size} processes: some would have nothing to do. "
            f"Use at most {len(points)} processes, or a larger grid."
        )
    order = sorted(points, key=_rows)  # stable: within the same rows, in the grid's order
    first, last = (len(order) * k // world.size for k in (world.rank, world.rank + 1))
    return {point.name for point in order[first:last]}


def _rows(point: Point) -> tuple[str, ...]:
    """What decides which rows a run computes in its steps."""
    t = point.train
    settings = (point.varied.get("data"), t.max_length, t.batch_size, t.seed, t.shuffle, t.packing)
    return tuple(map(str, settings))


@dataclass
class Rungs:
    """Losses at the rungs of halving, of the runs of every process."""

    world: World
    sweep: str = field(init=False)

    def __post_init__(self) -> None:
        # a name of this very start: what an earlier start left behind says nothing about it
        self.sweep = self.world.of_first(uuid.uuid4().hex)

    def publish(self, rung: int, losses: Mapping[str, float]) -> None:
        """Let the others know the losses of this process's runs that were alive at `rung`."""
        if self.world.board is not None:
            self.world.board.set(self._key(rung, self.world.rank), json.dumps(dict(losses)))

    def everyone(
        self, rung: int, losses: Mapping[str, float], stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The losses of all runs at `rung`, once every process is there; None if `stop` became true before."""
        if self.world.board is None:
            return dict(losses)
        self.publish(rung, losses)
        keys = [self._key(rung, rank) for rank in range(self.world.size)]
        if not wait_for(self.world.board, keys, stop):
            return None
        return {k: v for key in keys for k, v in json.loads(self.world.board.get(key)).items()}

    def _key(self, rung: int, rank: int) -> str:
        return f"lorasmith/{self.sweep}/rung/{rung}/{rank}"
