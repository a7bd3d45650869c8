"""B with blocks: what the outputs of one part may not take from the inputs of another is zero, and not stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Span = tuple[int, int]


def group_spans(out_features: int, groups: int) -> tuple[Span, ...]:
    """Rows of each of `groups` equal parts, as (start, stop)."""
    size = out_features // groups
    return tuple((i * size, (i + 1) * size) for i in range(groups))


def spread(stored: Tensor, spans: Sequence[Span], out_features: int) -> Tensor:
    """B (out_features, parts · rank) from its blocks (Σ rows, rank); zero elsewhere.

    The block of part i takes the rows `spans[i]` and the columns i · rank … (i + 1) · rank.
    """
    rank = stored.shape[1]
    rows = torch.cat([torch.arange(start, stop, device=stored.device) for start, stop in spans])
    parts = torch.repeat_interleave(
        torch.arange(len(spans), device=stored.device),
        torch.tensor([stop - start for start, stop in spans], device=stored.device),
    )
    columns = parts[:, None] * rank + torch.arange(rank, device=stored.device)
    B = stored.new_zeros(out_features, len(spans) * rank)
    return B.index_put((rows[:, None], columns), stored)


def gather(B: Tensor, spans: Sequence[Span]) -> Tensor:
    """The blocks of B, (Σ rows, rank): the inverse of `spread`.

    Raises:
        ValueError: B is not zero outside of them.
    """
    rank, rest = divmod(B.shape[1], len(spans))
    if rest:
        raise ValueError(f"rank {B.shape[1]} does not divide into {len(spans)} parts")
    blocks = [B[start:stop, i * rank : (i + 1) * rank] for i, (start, stop) in enumerate(spans)]
    stored = torch.cat(blocks)
    if not torch.equal(spread(stored, spans, B.shape[0]), B):
        raise ValueError(f"B is not zero outside the blocks of its {len(spans)} parts")
    return stored
