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
        self._claim = threading.Lock()
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

    def wait(self, timeout_s: float) -> bool:
        """Wait for the result, not longer than `timeout_s`; return whether it is there."""
        return self._done.wait(timeout_s)

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the result.

        Raises:
            TimeoutError: it did not come in time.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the request did not finish within {timeout_s} s")
        assert self._result is not None
        return self._result

    def claim(self) -> bool:
        """Whether the caller is the first that wants to give the result. Only the engine calls it."""
        return self._claim.acquire(blocking=False)

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
        order: of admission.
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
    order: int = 0
    next_token: int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    rest: str = ""  # text that no event has carried yet
    is_told: bool = False  # of the end

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
        if choice.error is not None:
            self.fail(choice.error)
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
        try:
            text = self._text()
        except Exception as error:  # a tokenizer that cannot decode what the model wrote
            self.fail(f"decoding failed: {type(error).__name__}: {error}")
            text = self.stream.text
        assert self.finish_reason is not None
        return self._result(text, self.finish_reason, self.error)

    def to_failure(self, message: str) -> Result:
        """The result where a thread hangs in the middle of this row: only what is certain."""
        return self._result(self.stream.text, "error", message)

    def _result(self, text: str, reason: FinishReason, error: str | None) -> Result:
        return Result(
            token_ids=tuple(self.token_ids),
            text=text,
            adapter_digest=None if self.generation is None else self.generation.digest,
            finish_reason=reason,
            logprobs=tuple(self.logprobs) if self.request.logprobs else None,
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused,
            error=error,
        )

    def tell_end(self, result: Result) -> None:
        """Tell a listener of an end that no token brought (an error or a cancel); what it raises is lost."""
        if self.on_token is not None and not self.is_told:
            self.is_told = True
            with contextlib.suppress(Exception):
                self.on_token(TokenEvent(None, self.rest, None, result.finish_reason))

    def _text(self) -> str:
        if self.on_token is None and not self.request.stop:
            for token in self.token_ids:
                self.stream.push(token)
        self.rest = self.stream.finish()
        return self.stream.text

    def _end(self, reason: FinishReason, token: int | None, logprob: float | None, piece: str = "") -> None:
        self.finish_reason = reason
        text = piece + self.stream.finish()
        self.is_told = True
        self._tell(TokenEvent(token, text, logprob, reason))

    def _tell(self, event: TokenEvent) -> None:
        if self.on_token is None:
            return
        try:
            self.on_token(event)
        except Exception as error:  # a caller's callback ends its own request only
            self.is_told = True
            self.fail(f"on_token raised {type(error).__name__}: {error}")
