"""What a training step keeps per token, measured on a probe, and what then fits a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lorasmith.errors import BudgetError
from lorasmith.train.config import KernelsName, RecomputeName, TrainConfig
from lorasmith.train.loss import CHUNK_BYTES
from lorasmith.train.policy import computing, repeated_layers

LEAST_TOKENS = 256
COSTS: Mapping[RecomputeName, float] = {"none": 1.0, "mlp": 1.1, "layers": 1.33}
"""Step time of each choice: the share of the products that is computed again."""


@dataclass(frozen=True)
class Use:
    """Bytes of one run.

    Attributes:
        held_bytes: base, adapter, optimizer and the process itself, whatever the batch.
        per_token_bytes: kept by each choice for the backward pass, its working set included.
    """

    held_bytes: int
    per_token_bytes: Mapping[RecomputeName, int]

    def peak_bytes(self, recompute: RecomputeName, tokens: int) -> int:
        """Of a forward and backward pass over `tokens`."""
        return self.held_bytes + tokens * self.per_token_bytes[recompute]


@dataclass(frozen=True)
class Fit:
    """A choice that fits, and what it will take."""

    recompute: RecomputeName
    batch_tokens: int
    peak_bytes: int


def fit(use: Use, budget_bytes: int, *, batch_tokens: int, longest: int) -> Fit:
    """The fastest choice whose peak stays within the budget.

    Args:
        batch_tokens: the most to compute at once. longest: the least, one row.

    Raises:
        BudgetError: nothing fits; says what the least would take.
    """
    sizes = [max(longest, batch_tokens >> k) for k in range(12) if batch_tokens >> k >= LEAST_TOKENS]
    options = [
        (COSTS[name] * (1 + 16 / size), -size, Fit(name, size, use.peak_bytes(name, size)))
        for name in use.per_token_bytes
        for size in sizes or [longest]
    ]
    fitting = [option for option in options if option[2].peak_bytes <= budget_bytes]
    if not fitting:
        least = min(option[2].peak_bytes for option in options)
        raise BudgetError(
            f"A budget of {_gib(budget_bytes)} was asked; the least that this run takes is {_gib(least)}: "
            f"{_gib(use.held_bytes)} for base, adapter and optimizer, and "
            f"{min(use.per_token_bytes.values()) / 2**10:,.0f} KiB for each of {longest:,} tokens. "
            "Raise the budget, shorten --max-length, lower the rank, or take a smaller base."
        )
    return min(fitting, key=lambda option: option[:2])[2]


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Inside, what autograd saves besides the model's own tensors is counted; the list then holds its bytes."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    found: list[int] = []

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield found
    found.append(sum(seen.values()))


def measure_use(model: nn.Module, loss_of: Callable[[], Tensor], *, slots: int, kernels: KernelsName) -> Use:
    """What a run of this model takes, by forward passes over a probe.

    Args:
        loss_of: forward pass over `slots` slots; its graph is dropped.
    """
    kept: dict[RecomputeName, float] = {}
    layers = max(1, len(repeated_layers(model)))
    for name in COSTS:
        asked: KernelsName = "plain" if kernels in ("plain", "inductor") else "block"
        with computing(model, kernels=asked, recompute=name, flops=0, warm_up=loss_of) as policy:
            if name == "mlp" and policy.kernels != "block":
                continue  # only the block knows what gate and up are
            with saved_bytes(model) as found:
                loss_of()
        kept[name] = found[0] / slots
        if (
            name == "layers" and policy.kernels != "block"
        ):  # recomputation holds its inputs where no hook looks
            kept[name] += layers * _width(model) * next(model.parameters()).element_size()
    working = 2 * kept["none"] / layers  # one layer at a time: what it forms again, and gradients
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = psutil.Process().memory_info().rss + 3 * trained + CHUNK_BYTES  # gradients and two moments
    return Use(held, {name: round(size + working) for name, size in kept.items()})


def settle(settings: TrainConfig, use: Callable[[], Use], *, longest: int) -> tuple[TrainConfig, Fit | None]:
    """`recompute` and `batch_tokens` filled in by the budget; everything is kept where there is none.

    Args:
        use: measures the run; called only for a budget. longest: tokens of the longest row.

    Raises:
        BudgetError: as `fit`.
    """
    asked = settings.recompute
    if settings.budget_bytes is None:
        return replace(settings, recompute="none" if asked == "auto" else asked), None
    measured = use()
    if asked != "auto":
        asked = asked if asked in measured.per_token_bytes else "layers"
        measured = replace(measured, per_token_bytes={asked: measured.per_token_bytes[asked]})
    found = fit(measured, settings.budget_bytes, batch_tokens=settings.batch_tokens, longest=longest)
    return replace(settings, recompute=found.recompute, batch_tokens=found.batch_tokens), found


def settled_before(settings: TrainConfig, run: Mapping[str, Any]) -> TrainConfig:
    """The same choice as an earlier start of this run made, since memory in use differs from start to start.

    Args:
        run: contents of its `run.json`.
    """
    return replace(settings, **{name: run["train"][name] for name in ("recompute", "batch_tokens")})


def _width(model: nn.Module) -> int:
    return int(getattr(getattr(model, "config", None), "hidden_size", 0))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
