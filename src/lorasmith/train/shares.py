"""Which examples of a step each process computes. Together they are the step that one process would make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from lorasmith.data import Example, Steps, shared_length
from lorasmith.errors import ConfigError
from lorasmith.train.batch import Batch
from lorasmith.train.config import PackingName
from lorasmith.train.world import World


@dataclass(frozen=True)
class Share:
    """Item k holds the examples of optimizer step k that this process computes; none, at times, of the last."""

    plan: Steps
    examples: Sequence[Example]
    packing: PackingName
    world: World

    def __getitem__(self, step: int) -> list[int]:
        indices = self.plan[step]
        if self.world.size == 1:
            return indices
        return deal(self.examples, indices, self.world.size, packing=self.packing)[self.world.rank]


def require_enough(batch_size: int, examples: int, world: World) -> None:
    """Refuse steps that have not a sequence for each process.

    Raises:
        ConfigError: naming the numbers.
    """
    if min(batch_size, examples) < world.size:
        raise ConfigError(
            f"batch_size={batch_size} and {examples} examples on {world.size} processes: some would never have "
            f"anything to do. Use a batch size of at least {world.size}, more examples, or fewer processes."
        )


def deal(
    examples: Sequence[Example], indices: Sequence[int], size: int, *, packing: PackingName
) -> list[list[int]]:
    """`indices` in `size` lists of about equal work; an even number of lists is not assumed.

    With the tree, neighbours in the order of their tokens stay together, for they share beginnings; else the
    longest that is left goes to whoever has least.
    """
    if packing != "tree":
        return _by_length(examples, indices, size)
    order = sorted(indices, key=lambda i: (examples[i].tokens.tolist(), i))
    shared = [0, *(shared_length(examples[a], examples[b]) for a, b in pairwise(order))]
    ends = list(accumulate(len(examples[i]) - common for i, common in zip(order, shared, strict=True)))
    cuts = [0]
    for k in range(1, size):
        wanted = sum(end * size <= k * ends[-1] for end in ends)
        cuts.append(min(max(wanted, cuts[-1] + 1), max(len(order) - (size - k), cuts[-1]), len(order)))
    return [order[a:b] for a, b in pairwise([*cuts, len(order)])]


def _by_length(examples: Sequence[Example], indices: Sequence[int], size: int) -> list[list[int]]:
    lists: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    for i in sorted(indices, key=lambda i: -len(examples[i])):
        least = min(range(size), key=lambda k: (tokens[k], len(lists[k])))
        lists[least].append(i)
        tokens[least] += len(examples[i])
    return lists


def in_step(batches: list[Batch], world: World) -> list[Batch]:
    """As many passes as every process makes: with a sharded base each pass gathers weights from all of them."""
    if not world.is_sharded:
        return batches
    return batches + [blank()] * (world.most(len(batches)) - len(batches))


def blank() -> Batch:
    """A pass that computes one slot and predicts nothing: its loss and gradients are zero."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(torch.zeros(1, 1, dtype=torch.int64), None, None, nothing, nothing)
