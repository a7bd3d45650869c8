"""One running request: its tokens, its adapter, its text, and the handle its caller holds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from lorasmith.engine.prefix import Owner
from lorasmith.engine.registry import Generation
from lorasmith.engine.requests import FinishReason, OnToken, Request, Result, TokenEvent
from lorasmith.engine.sampling import Choice, Sampler
from lorasmith.engine.text import TextStream


class Handle:
    """What `submit` returns. All methods may be called from any thread."""

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._done = threading.Event()
        self._result: Result | None = None
        self._on_cancel = on_cancel
        self._on_done: Callable[[Result], None] | None = None
        self._lock = threading.Lock()
        self.is_cancelled = False

    def cancel(self) -> None:
        """End the request within one step; what it wrote so far is its result."""
        self.is_cancelled = True
        self._on_cancel()

    def done(self) -> bool:
        """Whether the result is there."""
        return self._done.is_set()

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the result.

        Raises:
            TimeoutError: it did not come in time.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the request did not finish within {timeout_s} s")
        assert self._result is not None
        return self._result

    def when_done(self, callback: Callable[[Result], None]) -> None:
        """Call back once with the result: from the loop's thread, or at once if it is there already."""
        with self._lock:
            self._on_done = callback
            is_late = self._result is not None
        if is_late:
            callback(self.result())

    def set(self, result: Result) -> None:
        """Called once by the engine."""
        with self._lock:
            self._result = result
            callback = self._on_done
        self._done.set()
        if callback is not None:
            with contextlib.suppress(Exception):  # a listener's fault must not stop the loop
                callback(result)


@dataclass(eq=False)
class Row:
    """State of one request from submission to its end.

    Attributes:
        prompt: its token ids.
        filled: tokens of the prompt and the answer whose keys and values are in the cache.
        next_token: chosen, not yet in the cache.
    """

    request: Request
    prompt: list[int]
    generation: Generation | None
    owner: Owner
    sampler: Sampler
    stream: TextStream
    stop_token_ids: frozenset[int]
    on_token: OnToken | None
    handle: Handle
    filled: int = 0
    reused: int = 0
    next_token: int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def is_prefilling(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.next_token is None

    @property
    def max_cache_tokens(self) -> int:
        """Cache that the request may need: its last token is never written."""
        return len(self.prompt) + self.request.max_tokens - 1

    def accept(self, choice: Choice) -> None:
        """Take the token that was chosen for this row, and see whether the answer ends."""
        if not choice.is_finite:
            self.fail("the logits are not finite")
            return
        token = choice.token
        self.next_token = token
        if token in self.stop_token_ids and not self.request.ignore_eos:
            self._end("stop", None, None)
            return
        self.token_ids.append(token)
        if choice.logprob is not None:
            self.logprobs.append(choice.logprob)
        # Without a listener or a stop text the answer is decoded once, at its end.
        piece = self.stream.add(token) if self.on_token is not None or self.request.stop else ""
        if self.stream.is_stopped:
            self._end("stop", token, choice.logprob, piece)
        elif len(self.token_ids) >= self.request.max_tokens:
            self._end("length", token, choice.logprob, piece)
        else:
            self._tell(TokenEvent(token, piece, choice.logprob))

    def fail(self, message: str) -> None:
        """End this request with an error."""
        self.finish_reason, self.error = "error", message

    def cancel(self) -> None:
        """End this request with what it has."""
        self.finish_reason = "cancelled"

    def to_result(self) -> Result:
        """The result of a request that ended."""
        assert self.finish_reason is not None
        return Result(
            token_ids=tuple(self.token_ids),
            text=self._text(),
            adapter_digest=None if self.generation is None else self.generation.digest,
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs) if self.request.logprobs else None,
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused,
            error=self.error,
        )

    def _text(self) -> str:
        if self.on_token is None and not self.request.stop:
            for token in self.token_ids:
                self.stream.push(token)
        self.stream.finish()
        return self.stream.text

    def _end(self, reason: FinishReason, token: int | None, logprob: float | None, piece: str = "") -> None:
        self.finish_reason = reason
        self._tell(TokenEvent(token, piece + self.stream.finish(), logprob, reason))

    def _tell(self, event: TokenEvent) -> None:
        if self.on_token is None:
            return
        try:
            self.on_token(event)
        except Exception as error:  # a caller's callback ends its own request only
            self.fail(f"on_token raised {type(error).__name__}: {error}")
