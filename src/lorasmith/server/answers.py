"""Answers in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorasmith.engine import Result
from lorasmith.server.names import Resolved


@dataclass(frozen=True)
class Receipt:
    """What made an answer: in every header and body."""

    resolved: Resolved
    base_id: str
    base_fingerprint: str

    def headers(self) -> dict[str, str]:
        """For the HTTP response."""
        digest, version = self.resolved.digest, self.resolved.version
        return {
            "x-lorasmith-model": self.resolved.model,
            "x-lorasmith-adapter-digest": digest or "none",
            "x-lorasmith-adapter-version": str(version or "none"),
            "x-lorasmith-base-fingerprint": self.base_fingerprint or "none",
        }

    def body(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "adapter": self.resolved.name if self.resolved.digest else None,
            "adapter_digest": self.resolved.digest,
            "adapter_version": self.resolved.version,
            "base": self.base_id,
            "base_fingerprint": self.base_fingerprint,
        }


@dataclass(frozen=True)
class Shape:
    """One kind of answer: chat or plain text.

    Attributes:
        choices: answers to each prompt.
        logprobs: whether they were asked for.
    """

    is_chat: bool
    id: str
    receipt: Receipt
    created: int
    tokenizer: Any
    choices: int
    logprobs: bool

    @classmethod
    def new(
        cls, *, is_chat: bool, request_id: str, receipt: Receipt, tokenizer: Any, choices: int, logprobs: bool
    ) -> Shape:
        """For one request."""
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}"
        return cls(is_chat, name, receipt, int(time.time()), tokenizer, choices, logprobs)

    def whole(self, results: Iterable[Result]) -> dict[str, Any]:
        """The answer as one object."""
        results = list(results)
        choices = [self._choice(i, r) for i, r in enumerate(results)]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._envelope(kind) | {"choices": choices, "usage": self._usage(results)}

    def first(self, count: int) -> Iterable[dict[str, Any]]:
        """Chat streams begin with the role."""
        if self.is_chat:
            for index in range(count):
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str, logprobs: Any = None) -> dict[str, Any]:
        """Some more text."""
        said = {"delta": {"content": text}} if self.is_chat else {"text": text}
        chunk = self._chunk(index, said, None, logprobs)
        del chunk["lorasmith"]  # the first and the last chunk carry it
        return chunk

    def last(self, index: int, result: Result) -> dict[str, Any]:
        """The end of one choice."""
        said: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        return self._chunk(index, said, result.finish_reason)

    def usage(self, results: Iterable[Result]) -> dict[str, Any]:
        """The chunk that OpenAI sends when asked for usage."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._envelope(kind) | {"choices": [], "usage": self._usage(list(results))}

    def logprobs_of(self, tokens: Iterable[int], logprobs: Iterable[float]) -> dict[str, Any] | None:
        """Of the chosen tokens, as this kind of answer gives them."""
        if not self.logprobs:
            return None
        pairs = [(self._text(t), value) for t, value in zip(tokens, logprobs, strict=False)]
        if self.is_chat:
            entries = [
                {"token": t, "logprob": v, "bytes": list(t.encode()), "top_logprobs": []} for t, v in pairs
            ]
            return {"content": entries, "refusal": None}
        texts, values = [t for t, _ in pairs], [v for _, v in pairs]
        return {
            "tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": _offsets(texts),
        }  # fmt: skip

    def _usage(self, results: list[Result]) -> dict[str, Any]:
        """A prompt counts once, however many answers were made to it."""
        prompt = sum(r.prompt_tokens for r in results[:: self.choices])
        answer = sum(len(r.token_ids) for r in results)
        reused = sum(r.reused_tokens for r in results[:: self.choices])
        return {
            "prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": reused},
        }  # fmt: skip

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token])) if self.tokenizer is not None else str(token)

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        said: dict[str, Any] = {"text": result.text}
        if self.is_chat:
            said = {"message": {"role": "assistant", "content": result.text, "refusal": None}}
        logprobs = self.logprobs_of(result.token_ids, result.logprobs or ())
        return {"index": index, **said, "finish_reason": result.finish_reason, "logprobs": logprobs}

    def _chunk(
        self, index: int, said: dict[str, Any], finish: str | None, logprobs: Any = None
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        choice = {"index": index, **said, "finish_reason": finish, "logprobs": logprobs}
        return self._envelope(kind) | {"choices": [choice]}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.receipt.resolved.model,
            "system_fingerprint": self.receipt.base_fingerprint, "lorasmith": self.receipt.body(),
        }  # fmt: skip


def as_event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def _offsets(texts: list[str]) -> list[int]:
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    return offsets
