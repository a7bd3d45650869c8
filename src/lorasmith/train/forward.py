"""From a batch to the sum of its losses, through whatever of the model is there to be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.train.batch import Batch
from lorasmith.train.loss import chunk_tokens_for, cross_entropy, full_logits_loss
from lorasmith.train.parts import split_model, vocabulary_of


class Forward:
    """Computes losses of one model. Made once a run: it probes what the model can do."""

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0) -> None:
        self.model = model
        self.parts = split_model(model)
        self.label_smoothing = label_smoothing
        self.wants_additive_mask = _attention_name(model) == "eager"
        self.device = next(model.parameters()).device
        self.chunk_tokens = 128
        if self.parts is not None:
            weight = self.parts.head.module.get_parameter("weight")
            self.chunk_tokens = chunk_tokens_for(weight.shape[0], weight.element_size())

    def loss_sum(self, batch: Batch) -> Tensor:
        """Σ over the batch's supervised tokens of their losses, in nats."""
        return self.loss_sums(batch, [(len(batch.targets), self.label_smoothing)])[0]

    def loss_sums(self, batch: Batch, shares: Sequence[tuple[int, float]]) -> list[Tensor]:
        """The same for each share of the supervised tokens, in order.

        Args:
            shares: number of tokens, and label smoothing, of each.
        """
        batch = batch.to(self.device)
        kwargs = self._mask_arguments(batch)
        counts = [count for count, _ in shares]
        targets = torch.split(batch.targets, counts)
        if self.parts is None:
            logits = self.model(input_ids=batch.input_ids, use_cache=False, **kwargs).logits.flatten(0, 1)
            pairs = zip(torch.split(batch.sources, counts), targets, shares, strict=True)
            return [full_logits_loss(logits, rows, t, label_smoothing=s) for rows, t, (_, s) in pairs]
        hidden = self.parts.body(batch.input_ids, **kwargs).flatten(0, 1).index_select(0, batch.sources)
        pairs = zip(torch.split(hidden, counts), targets, shares, strict=True)
        return [
            cross_entropy(h, t, self.parts.head, label_smoothing=s, chunk_tokens=self.chunk_tokens)
            for h, t, (_, s) in pairs
        ]

    def probe(self) -> None:
        """One forward pass on a few tokens, for those who watch the layers."""
        ids = torch.arange(4, device=self.device)[None]
        self.model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def can_mask(self, longest: int) -> bool:
        """Whether two sequences in one row, under a mask of ours, get what each gets alone."""
        window = getattr(getattr(self.model, "config", None), "sliding_window", None)
        if self.parts is None or (window is not None and window < longest):
            return False
        vocabulary = vocabulary_of(self.parts.head.module)
        a, b = (torch.arange(5, device=self.device) * k % vocabulary for k in (3, 5))
        together = _two_in_a_row(a, b)
        try:
            packed = self.parts.body(together.input_ids, **self._mask_arguments(together))[0]
            alone = torch.cat([self.parts.body(x[None])[0] for x in (a, b)])
        except (TypeError, ValueError, RuntimeError):
            return False
        # Different kernels round differently; a leak between the two is far larger than this.
        return bool((packed - alone).abs().max() <= 0.05 * alone.abs().max())

    def _mask_arguments(self, batch: Batch) -> dict[str, Any]:
        if batch.attention is None:
            return {}
        mask = batch.attention
        if self.wants_additive_mask:
            dtype = next(self.model.parameters()).dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        return {"attention_mask": mask, "position_ids": batch.positions}


def _attention_name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", ""))


def _two_in_a_row(a: Tensor, b: Tensor) -> Batch:
    positions = torch.cat([torch.arange(len(x), device=x.device) for x in (a, b)])
    owner = torch.cat([torch.full_like(a, 0), torch.full_like(b, 1)])
    slot = torch.arange(len(owner), device=a.device)
    visible = (owner[None] == owner[:, None]) & (slot[None] <= slot[:, None])
    nothing = slot[:0]
    return Batch(torch.cat([a, b])[None], positions[None], visible[None, None], nothing, nothing)
