"""Loss of a model on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasmith.data import Example
from lorasmith.train.batch import Layout
from lorasmith.train.forward import Forward
from lorasmith.train.shares import in_step
from lorasmith.train.world import ALONE, World

ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class EvalLoss:
    """`loss`: mean nats per supervised token over `tokens` of them."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate_loss(
    forward: Forward,
    examples: Sequence[Example],
    *,
    layout: Layout | None = None,
    batch_tokens: int = 4096,
    world: World = ALONE,
) -> EvalLoss:
    """Mean loss over every supervised token of `examples`. Changes no mode, weight or random state.

    Args:
        world: the processes that share the work; each gets the same answer.
    """
    layout = layout or Layout("none", "")
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    total, tokens = 0.0, 0
    was_training = [module for module in forward.model.modules() if module.training]
    forward.model.eval()
    try:
        for first in range(0, len(order), ROWS_AT_ONCE * world.size):
            start = first + ROWS_AT_ONCE * world.rank
            chosen = order[start : start + ROWS_AT_ONCE]
            batches = layout.batches(examples, chosen, batch_tokens=batch_tokens) if chosen else []
            for batch in in_step(batches, world):
                total += forward.loss_sum(batch).item()
                tokens += len(batch.targets)
    finally:
        for module in was_training:
            module.training = True
    total, counted = world.total(total, tokens)
    return EvalLoss(total / max(counted, 1), int(counted))
