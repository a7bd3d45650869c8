"""What is asked of the engine and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorasmith.errors import ConfigError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt, the adapter that answers it, and how to choose tokens.

    Attributes:
        prompt: a text (one user turn where the base has a chat template), token ids, or chat messages.
        adapter: a registered name or a content digest; None is the plain base.
        max_tokens: new tokens at most.
        temperature: 0 takes the most probable token.
        top_p: sample from the smallest set of tokens that holds this much probability.
        top_k: sample from this many tokens; None is all of them.
        seed: of this request's own random stream; None draws one.
        stop: texts that end the answer; they are not part of it.
        ignore_eos: go on after the model's end-of-turn token.
        logprobs: report the log-probability of each token, before temperature.
        tenant: whose prefix cache this request may share. Set by the server, never by a client.
    """

    prompt: Prompt
    adapter: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    tenant: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        faults = list(_faults(self))
        if faults:
            raise ConfigError("Request cannot be used:\n  " + "\n  ".join(faults))


@dataclass(frozen=True)
class Result:
    """The answer to one request.

    Attributes:
        token_ids: the new tokens, without the end-of-turn token that closed them.
        text: what they say, cut before a stop text.
        adapter_digest: of the weights that made the answer; None for the plain base.
        finish_reason: `"error"` comes with `error`.
        prompt_tokens: tokens of the prompt; `reused_tokens` of them came from the prefix cache.
    """

    token_ids: tuple[int, ...]
    text: str
    adapter_digest: str | None
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    prompt_tokens: int = 0
    reused_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One step of a streamed answer: `text` is what became certain with this token."""

    token_id: int | None
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None


OnToken = Callable[[TokenEvent], None]


def _faults(r: Request) -> Sequence[str]:
    faults = []
    if not _is_count(r.max_tokens):
        faults.append(f"max_tokens={r.max_tokens!r}: use a whole number of at least 1")
    if not (_is_number(r.temperature) and r.temperature >= 0):
        faults.append(f"temperature={r.temperature!r}: use a number of at least 0")
    if not (_is_number(r.top_p) and 0 < r.top_p <= 1):
        faults.append(f"top_p={r.top_p!r}: use a number above 0, at most 1")
    if r.top_k is not None and not _is_count(r.top_k):
        faults.append(f"top_k={r.top_k!r}: use a whole number of at least 1, or None for all tokens")
    if r.seed is not None and (isinstance(r.seed, bool) or not isinstance(r.seed, int)):
        faults.append(f"seed={r.seed!r}: use a whole number")
    if not all(isinstance(s, str) and s for s in r.stop):
        faults.append(f"stop={r.stop!r}: use texts that are not empty")
    return faults


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
