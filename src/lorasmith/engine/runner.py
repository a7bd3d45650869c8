"""What the scheduler asks of a runner, and the batch that it hands over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lorasmith.engine.cache import KVCache
from lorasmith.engine.slots import Routing, Slots


@dataclass(frozen=True)
class Batch:
    """New tokens of some rows of the cache.

    Attributes:
        tokens: (rows, new) token ids, padded on the right.
        rows: numbers of the cache rows.
        starts: tokens that each row holds already.
        lengths: new tokens of each row, without padding.
        routing: the adapters of the rows; None for the plain base.
    """

    tokens: Tensor
    rows: Sequence[int]
    starts: Sequence[int]
    lengths: Sequence[int]
    routing: Routing | None

    @property
    def span(self) -> int:
        """Length of the longest row after this step, its padding not counted."""
        return max(start + length for start, length in zip(self.starts, self.lengths, strict=True))


class Runner(Protocol):
    """One forward pass over a batch, with its keys and values written to the cache.

    Attributes:
        is_row_invariant: a batch of always the same shape gives each row bits of its own.
        is_solo: every row runs alone, with its whole prompt at once.
    """

    name: str
    model: Any
    is_row_invariant: bool
    is_solo: bool
    vocab_size: int
    max_positions: int | None
    cache: KVCache
    slots: Slots

    def forward(self, batch: Batch) -> Tensor:
        """Logits after the last new token of each row, (rows, vocabulary)."""

    def refresh(self) -> None:
        """The model's weights changed (an adapter was merged or taken out)."""

    def renewed(self) -> Runner:
        """A runner on the same model with a cache and slots of its own, where this one hangs."""

    def attached(self) -> Runner:
        """The runner for an adapter that was put on the model itself; it writes to the same cache."""


def rows_of(batch: Batch) -> slice | list[int]:
    """The cache rows as a slice where they lie together, so that reading them copies nothing."""
    rows = list(batch.rows)
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return rows
