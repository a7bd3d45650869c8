"""The key-value cache: one row per running request, each with its own write position.

Per layer two tensors of shape (rows, tokens, heads, head_dim). Live rows are rows 0 … n - 1, so that
attention reads a view and gathers nothing. A row that leaves is replaced by the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.errors import BudgetError

GROWTH_TOKENS = 128


@dataclass(frozen=True)
class KVShape:
    """Heads and width of the keys of every layer (values may be wider or narrower)."""

    key_dims: tuple[tuple[int, int], ...]
    value_dims: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, for one row."""
        numbers = sum(h * d for h, d in (*self.key_dims, *self.value_dims))
        return numbers * self.dtype.itemsize


class KVCache:
    """Keys and values of up to `max_rows` rows. Memory grows in steps, up to `max_tokens` per row."""

    def __init__(self, shape: KVShape, max_rows: int) -> None:
        self.shape = shape
        self.max_rows = max_rows
        self.max_tokens = GROWTH_TOKENS
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.reserve(GROWTH_TOKENS)

    @property
    def num_bytes(self) -> int:
        """Allocated now."""
        return self.shape.bytes_per_token * self.max_rows * self.capacity

    def limit(self, max_bytes: int, max_tokens: int) -> None:
        """Let rows grow to `max_tokens`, or to what fits `max_bytes`. Only while no row is alive.

        Raises:
            BudgetError: not even one token and its successor fit.
        """
        token_bytes = self.shape.bytes_per_token * self.max_rows
        self.max_tokens = min(max_tokens, max_bytes // token_bytes)
        if self.max_tokens < 2:
            raise BudgetError(
                f"Engine: kv_cache_bytes={max_bytes:,} and max_context={max_tokens:,} leave "
                f"{max(0, self.max_tokens)} tokens for each of {self.max_rows} rows "
                f"({token_bytes:,} bytes for one token of every row). Raise them, or lower max_rows."
            )
        self.keys, self.values, self.capacity = [], [], 0
        self.reserve(min(GROWTH_TOKENS, self.max_tokens))

    def renewed(self) -> KVCache:
        """An empty cache of the same shape and limits."""
        other = KVCache(self.shape, self.max_rows)
        other.max_tokens = self.max_tokens
        other.keys, other.values, other.capacity = [], [], 0
        other.reserve(min(GROWTH_TOKENS, self.max_tokens))
        return other

    def reserve(self, tokens: int) -> None:
        """Make every row at least `tokens` long; what was written stays."""
        if tokens <= self.capacity:
            return
        wanted = max(tokens, min(2 * self.capacity, self.max_tokens))
        rounded = -(-wanted // GROWTH_TOKENS) * GROWTH_TOKENS
        wanted = max(wanted, min(rounded, self.max_tokens))  # never beyond the budget that rows were given
        self.keys = self._grown(self.keys, self.shape.key_dims, wanted)
        self.values = self._grown(self.values, self.shape.value_dims, wanted)
        self.capacity = wanted

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of row `source` over row `target`."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :tokens].copy_(tensor[source, :tokens])

    def clear(self, row: int) -> None:
        """Overwrite a row with zeros."""
        for tensor in (*self.keys, *self.values):
            tensor[row].zero_()

    def read(self, row: int, start: int, end: int) -> list[Tensor]:
        """An independent copy of some tokens of one row: keys of each layer, then values."""
        return [tensor[row, start:end].clone() for tensor in (*self.keys, *self.values)]

    def write(self, row: int, start: int, tensors: Sequence[Tensor]) -> None:
        """Put back what `read` gave."""
        for tensor, saved in zip((*self.keys, *self.values), tensors, strict=True):
            tensor[row, start : start + saved.shape[0]].copy_(saved)

    def flat_index(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where (row, position) lies in a tensor whose first two dimensions are flattened."""
        return (rows[:, None] * self.capacity + positions).flatten()

    def _grown(self, old: list[Tensor], dims: Sequence[tuple[int, int]], tokens: int) -> list[Tensor]:
        grown = []
        for layer, (heads, width) in enumerate(dims):
            # Zeros, not garbage: masked positions are multiplied by 0, and 0 · NaN is NaN.
            new = torch.zeros(
                self.max_rows, tokens, heads, width, dtype=self.shape.dtype, device=self.shape.device
            )
            if old:
                new[:, : self.capacity].copy_(old[layer])
                old[layer] = new  # frees the layer that was copied before the next one grows
            grown.append(new)
        return grown
