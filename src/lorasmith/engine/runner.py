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


class Runner(Protocol):
    """One forward pass over a batch, with its keys and values written to the cache."""

    name: str
    model: Any
    is_row_invariant: bool  # a batch of always the same shape gives each row bits of its own
    vocab_size: int
    max_positions: int | None
    cache: KVCache
    slots: Slots

    def forward(self, batch: Batch) -> Tensor:
        """Logits after the last new token of each row, (rows, vocabulary)."""

    def refresh(self) -> None:
        """The model's weights changed (an adapter was merged or taken out)."""


def rows_of(batch: Batch) -> slice | list[int]:
    """The cache rows as a slice where they lie together, so that reading them copies nothing."""
    rows = list(batch.rows)
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return rows
