"""One token per row from a batch of logits; each request has its own random stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.engine.requests import Request


@dataclass
class Sampler:
    """How one request chooses. `generator` is None for greedy requests."""

    temperature: float
    top_p: float
    top_k: int | None
    generator: torch.Generator | None
    logprobs: bool

    @classmethod
    def of(cls, request: Request) -> Sampler:
        """The sampler of `request`, its stream at the start."""
        generator = None
        if request.temperature > 0:
            generator = torch.Generator()
            generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        return cls(request.temperature, request.top_p, request.top_k, generator, request.logprobs)


@dataclass(frozen=True)
class Choice:
    """The token of one row. `is_finite` is False when its logits held NaN or infinity."""

    token: int
    logprob: float | None
    is_finite: bool


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """One choice for each row of `logits`, shape (rows, vocabulary)."""
    best, where = logits.max(dim=-1)
    finite = torch.isfinite(best).tolist()
    greedy: list[int] = where.tolist()
    choices = []
    for row, sampler in enumerate(samplers):
        token = greedy[row]
        if sampler.generator is not None and finite[row]:
            token = _draw(logits[row], sampler, sampler.generator)
        logprob = _logprob(logits[row], token) if sampler.logprobs and finite[row] else None
        choices.append(Choice(token, logprob, finite[row]))
    return choices


def _draw(logits: Tensor, sampler: Sampler, generator: torch.Generator) -> int:
    # The draw is made on the CPU in float32, so that a seed means the same on every device.
    scaled = logits.to("cpu", torch.float32)
    scaled = (scaled - scaled.max()) / sampler.temperature
    values, ids = scaled.sort(descending=True, stable=True)
    if sampler.top_k is not None:
        values, ids = values[: sampler.top_k], ids[: sampler.top_k]
    probabilities = values.softmax(0)
    if sampler.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities.masked_fill(before >= sampler.top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def _logprob(logits: Tensor, token: int) -> float:
    wide = logits.float()
    return float(wide[token] - wide.logsumexp(0))
