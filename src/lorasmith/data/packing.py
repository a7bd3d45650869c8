"""Examples laid side by side in rows, each seeing only itself; shared beginnings computed once.

A row is a forest of token paths. Two examples that begin with the same tokens share those slots;
every later slot attends to its own path, so each example gets what it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorasmith.data.encode import Example


@dataclass(frozen=True, eq=False)
class Row:
    """Slots of one row in depth-first order, and what they predict.

    Attributes:
        tokens: (slots,) token ids.
        positions: (slots,) position of each slot on its path.
        ends: (slots,) first slot after the subtree that hangs from each one. So slot b lies on
            the path of slot a exactly when b ≤ a < ends[b].
        sources: (n,) slot that predicts each supervised token.
        targets: (n,) that token's id.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)


def pack(
    examples: Sequence[Example], indices: Sequence[int], *, row_slots: int, share_prefixes: bool
) -> list[Row]:
    """Lay the chosen examples out in rows of about `row_slots` slots (a longer example gets its own).

    Args:
        share_prefixes: compute equal beginnings once per row (prefix tree); else each example
            stands alone.
    """
    order = (
        sorted(indices, key=lambda i: (examples[i].tokens.tolist(), i)) if share_prefixes else list(indices)
    )
    costs = [_new_slots(examples, order, k, share_prefixes) for k in range(len(order))]
    rows, start = [], 0
    limit = _even_limit(examples, order, costs, row_slots)
    while start < len(order):
        used, end = len(examples[order[start]]), start + 1
        while end < len(order) and used + costs[end] <= limit:
            used += costs[end]
            end += 1
        rows.append(_build(examples, order[start:end], share_prefixes))
        start = end
    return rows


def shared_length(a: Example, b: Example) -> int:
    """How many tokens two examples begin with in common."""
    n = min(len(a), len(b))
    different = np.nonzero(a.tokens[:n] != b.tokens[:n])[0]
    return int(different[0]) if len(different) else n


def _new_slots(examples: Sequence[Example], order: Sequence[int], k: int, share: bool) -> int:
    example = examples[order[k]]
    return len(example) - (shared_length(examples[order[k - 1]], example) if share and k else 0)


def _even_limit(
    examples: Sequence[Example], order: Sequence[int], costs: Sequence[int], row_slots: int
) -> int:
    """Slots per row so that the rows come out about equally long, for rows are padded to the longest."""
    total, longest = sum(costs), max(len(examples[i]) for i in order)
    rows = max(1, -(-total // row_slots))
    return max(-(-total // rows) + max(costs) // 2, longest) if rows > 1 else max(row_slots, longest)


def _build(examples: Sequence[Example], order: Sequence[int], share: bool) -> Row:
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    path: list[int] = []  # slots of the example before
    previous: Example | None = None
    for index in order:
        example = examples[index]
        common = shared_length(previous, example) if share and previous is not None else 0
        for slot in path[common:]:
            ends[slot] = len(tokens)
        first, rest = len(tokens), example.tokens[common:].tolist()
        path = path[:common] + list(range(first, first + len(rest)))
        tokens += rest
        positions += range(common, common + len(rest))
        ends += [-1] * len(rest)
        supervised = np.nonzero(example.supervised)[0]
        sources += [path[i - 1] for i in supervised]
        targets += example.tokens[supervised].tolist()
        previous = example
    for slot in path:
        ends[slot] = len(tokens)
    return Row(
        *(np.asarray(values, dtype=np.int64) for values in (tokens, positions, ends, sources, targets))
    )
