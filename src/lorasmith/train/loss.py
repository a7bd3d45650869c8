"""Cross-entropy over supervised tokens only, in chunks: the logits never exist whole.

Semantics, for hidden states h (n, d), targets t (n,) and a head:
    logits = cap(scale · head(h)),  cap(z) = c · tanh(z / c) where the model soft-caps, else z
    loss   = Σ_i (1 − ε) · −log p_i[t_i] + ε · mean_v −log p_i[v]
The gradient of h is formed beside the loss, chunk by chunk, so backward only multiplies.
Peak memory besides h and its gradient: `chunk_tokens · vocabulary · BYTES_PER_LOGIT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.train.elementwise import operations

BYTES_PER_LOGIT = {2: 2 + 4 + 2, 4: 4 + 4, 8: 8 + 8}
"""Bytes that one logit costs while its chunk lives, by the head's itemsize: logits, log p, gradient.
The C functions work in place and need only the first."""

CHUNK_BYTES = 96 * 2**20


@dataclass(frozen=True)
class Head:
    """How hidden states become logits.

    Attributes:
        module: the output layer; any module that maps (n, d) to (n, vocabulary).
        scale: multiplies the logits.
        softcap: c of the soft cap, or None.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocabulary) logits in the model's dtype."""
        z: Tensor = self.module(hidden)
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    @property
    def is_frozen_linear(self) -> bool:
        """Whether the gradient can skip autograd: an untouched `nn.Linear` that does not train."""
        plain = type(self.module) is nn.Linear and self.softcap is None
        return plain and not any(p.requires_grad for p in self.module.parameters())


def chunk_tokens_for(vocabulary: int, itemsize: int, *, budget_bytes: int = CHUNK_BYTES) -> int:
    """Tokens per chunk that keep the logits within `budget_bytes`; at least 16."""
    return max(16, budget_bytes // (vocabulary * BYTES_PER_LOGIT[itemsize]))


def cross_entropy(
    hidden: Tensor, targets: Tensor, head: Head, *, label_smoothing: float = 0.0, chunk_tokens: int = 128
) -> Tensor:
    """Sum of the losses of n tokens, a float32 scalar (float64 for a float64 model).

    Args:
        hidden: (n, d), the state that predicts each target.
        targets: (n,) token ids.
        label_smoothing: ε; the share of probability spread evenly over the vocabulary.
        chunk_tokens: rows of logits that exist at one time.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    parameters = [p for p in head.module.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or parameters):
        return _loss_only(hidden, targets, head, label_smoothing, chunk_tokens, wide)
    function = _FrozenHead if head.is_frozen_linear else _AnyHead
    options = _Options(targets, head, label_smoothing, chunk_tokens, wide)
    return function.apply(hidden, options, *parameters)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Options:
    targets: Tensor
    head: Head
    label_smoothing: float
    chunk_tokens: int
    wide: torch.dtype


def _loss_only(
    hidden: Tensor, targets: Tensor, head: Head, smoothing: float, chunk: int, wide: torch.dtype
) -> Tensor:
    total = torch.zeros((), dtype=wide, device=hidden.device)
    for h, t in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        z = head.logits(h)
        total += operations(z.dtype, z.device).cross_entropy_(z, t, smoothing).sum()
    return total


def _chunk_loss(logits: Tensor, targets: Tensor, smoothing: float, wide: torch.dtype) -> Tensor:
    log_p = torch.log_softmax(logits, -1, dtype=wide)
    loss = -log_p.gather(1, targets[:, None]).sum()
    return loss if not smoothing else (1 - smoothing) * loss - smoothing * log_p.mean(1).sum()


class _FrozenHead(torch.autograd.Function):
    """The head is a plain linear layer that does not train: d loss / d h = scale · (p − target) @ W."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, o: _Options, *_: Tensor) -> Tensor:
        weight = o.head.module.get_parameter("weight")
        total = torch.zeros((), dtype=o.wide, device=hidden.device)
        gradient = torch.empty_like(hidden)
        chunks = [torch.split(t, o.chunk_tokens) for t in (hidden, o.targets, gradient)]
        for h, t, g in zip(*chunks, strict=True):
            z = o.head.logits(h)
            total += operations(z.dtype, z.device).cross_entropy_(z, t, o.label_smoothing).sum()
            torch.mm(z if o.head.scale == 1.0 else z.mul_(o.head.scale), weight, out=g)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


class _AnyHead(torch.autograd.Function):
    """Any head, adapted, tied or trained: each chunk is differentiated on its own and forgotten."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, o: _Options, *parameters: Tensor) -> Tensor:
        total = torch.zeros((), dtype=o.wide, device=hidden.device)
        gradient = torch.empty_like(hidden)
        sums = [torch.zeros_like(p) for p in parameters]
        chunks = [torch.split(t, o.chunk_tokens) for t in (hidden, o.targets, gradient)]
        for h, t, g in zip(*chunks, strict=True):
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                loss = _chunk_loss(o.head.logits(leaf), t, o.label_smoothing, o.wide)
                of_leaf, *of_parameters = torch.autograd.grad(loss, [leaf, *parameters])
            total += loss.detach()
            g.copy_(of_leaf)
            for so_far, more in zip(sums, of_parameters, strict=True):
                so_far += more
        ctx.save_for_backward(gradient, *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *sums = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, *(s * grad.to(s.dtype) for s in sums)


def full_logits_loss(logits: Tensor, rows: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
    """The same sum for a model whose body and head cannot be told apart: all logits exist at once.

    Args:
        logits: (batch · length, vocabulary).
        rows: (n,) which of them predict `targets`.
    """
    chosen = logits.index_select(0, rows)
    return _chunk_loss(chosen, targets, label_smoothing, torch.promote_types(chosen.dtype, torch.float32))
