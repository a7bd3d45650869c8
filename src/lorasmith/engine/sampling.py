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
    """The token of one row, or why there is none."""

    token: int
    logprob: float | None
    error: str | None = None


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """One choice for each row of `logits`, shape (rows, vocabulary)."""
    best, where = logits.max(dim=-1)
    finite = torch.isfinite(best).tolist()
    greedy: list[int] = where.tolist()
    choices = []
    for row, sampler in enumerate(samplers):
        if not finite[row]:
            choices.append(Choice(0, None, "the logits are not finite"))
            continue
        try:
            choices.append(_choice(logits[row], greedy[row], sampler))
        except Exception as error:  # of this row alone: nobody else's stream has moved twice
            choices.append(Choice(0, None, f"sampling failed: {type(error).__name__}: {error}"))
    return choices


def _choice(logits: Tensor, best: int, sampler: Sampler) -> Choice:
    token = best if sampler.generator is None else _draw(logits, sampler, sampler.generator)
    return Choice(token, _logprob(logits, token) if sampler.logprobs else None)


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
