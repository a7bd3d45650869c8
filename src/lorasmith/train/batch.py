"""Rows of examples as tensors, and the choice of how they are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorasmith.data import Example, Row, pack
from lorasmith.errors import ConfigError
from lorasmith.train.config import PackingName

ROW_SLOTS = 1024
"""Slots of a packed row: attention costs what the mask lets be seen, but the mask itself costs slots²."""


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        input_ids: (rows, slots).
        positions: (rows, slots), or None where they are 0, 1, 2, ….
        attention: (rows, 1, slots, slots) booleans, or None where each slot sees all before it.
        sources: (n,) flat slots whose state predicts a supervised token.
        targets: (n,) that token.
    """

    input_ids: Tensor
    positions: Tensor | None
    attention: Tensor | None
    sources: Tensor
    targets: Tensor

    @property
    def slots(self) -> int:
        """What is computed, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """The same batch elsewhere."""
        moved = (None if t is None else t.to(device) for t in vars(self).values())
        return Batch(*moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Layout:
    """How examples share a forward pass, and why."""

    packing: PackingName
    reason: str

    def batches(
        self, examples: Sequence[Example], indices: Sequence[int], *, batch_tokens: int
    ) -> list[Batch]:
        """Forward passes of at most about `batch_tokens` slots that together make one optimizer step."""
        return [collate(group) for group in self.groups(examples, indices, batch_tokens=batch_tokens)]

    def groups(
        self, examples: Sequence[Example], indices: Sequence[int], *, batch_tokens: int
    ) -> list[list[Row]]:
        """The rows of each of those passes."""
        rows = self._rows(examples, indices)
        groups: list[list[Row]] = []
        for row in rows:
            if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= batch_tokens:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def _rows(self, examples: Sequence[Example], indices: Sequence[int]) -> list[Row]:
        if not indices:  # a process's share of a short last step
            return []
        if self.packing in ("plain", "tree"):
            share = self.packing == "tree"
            rows = pack(examples, indices, row_slots=ROW_SLOTS, share_prefixes=share)
        else:
            rows = [pack(examples, [i], row_slots=1, share_prefixes=False)[0] for i in indices]
        return sorted(rows, key=len, reverse=True)


def choose_layout(
    packing: PackingName,
    examples: Sequence[Example],
    steps: Sequence[Sequence[int]],
    *,
    can_mask: bool,
    dropout: float,
) -> Layout:
    """Settle `"auto"`: count the slots that each layout would compute on a sample of the steps.

    Args:
        can_mask: the model accepts an attention mask of our own.
        dropout: of the adapter; shared slots would share its mask, so the tree is exact only at 0.

    Raises:
        ConfigError: packing was asked of a model that would mix the sequences of a row.
    """
    if packing in ("plain", "tree") and not can_mask:
        raise ConfigError(
            f'packing="{packing}" was asked, but this model does not keep two sequences in one row '
            "apart: it takes no attention mask of our own, or its sliding window is shorter than the "
            "longest sequence. "
            'Use packing="none" or "auto".'
        )
    if packing == "tree" and dropout:
        raise ConfigError(
            f'packing="tree" was asked with dropout {dropout}: sequences that share slots would share their dropout '
            'mask, which changes the training. Use packing="plain" or "auto", or dropout 0.'
        )
    if packing != "auto":
        return Layout(packing, "as asked")
    if not can_mask:
        return Layout("none", "this model does not take an attention mask of our own")
    sample = [steps[k] for k in np.linspace(0, len(steps) - 1, num=min(len(steps), 16), dtype=int)]
    tree: PackingName = "plain" if dropout else "tree"
    slots = {
        name: sum(
            b.slots for s in sample for b in Layout(name, "").batches(examples, s, batch_tokens=1 << 30)
        )
        for name in ("none", tree)
    }
    ratio = slots["none"] / max(1, slots[tree])
    if ratio < 1.15:
        return Layout("none", f"packing would compute {ratio:.2f}x fewer slots, too little to gain")
    why = "shared beginnings are computed once" if tree == "tree" else "dropout forbids sharing beginnings"
    return Layout(tree, f"{ratio:.2f}x fewer slots than padding; {why}")


def collate(rows: Sequence[Row]) -> Batch:
    """Rows padded on the right to the longest. A single path per row needs neither mask nor positions."""
    length = max(len(row) for row in rows)
    ids = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.tokens
    sources = np.concatenate([row.sources + i * length for i, row in enumerate(rows)])
    targets = np.concatenate([row.targets for row in rows])
    if all(_is_single_path(row) for row in rows):
        # Padding comes last and nothing looks ahead, so plain causal attention is already right.
        return Batch(torch.from_numpy(ids), None, None, torch.from_numpy(sources), torch.from_numpy(targets))
    positions, attention = _masks(rows, length)
    return Batch(
        torch.from_numpy(ids), positions, attention, torch.from_numpy(sources), torch.from_numpy(targets)
    )


def _is_single_path(row: Row) -> bool:
    return bool((row.ends == len(row)).all())


def _masks(rows: Sequence[Row], length: int) -> tuple[Tensor, Tensor]:
    positions = np.zeros((len(rows), length), dtype=np.int64)
    ends = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        positions[i, : len(row)] = row.positions
        ends[i, : len(row)] = row.ends
        ends[i, len(row) :] = np.arange(len(row), length) + 1  # a padding slot sees itself alone
    slot = np.arange(length)
    visible = (slot[None, None, :] <= slot[None, :, None]) & (slot[None, :, None] < ends[:, None, :])
    return torch.from_numpy(positions), torch.from_numpy(visible)[:, None]
