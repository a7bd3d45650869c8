"""From the engine's thread to the event loop: one wake-up carries all tokens of a step."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from lorasmith.engine import Handle, OnToken, Result, TokenEvent
from lorasmith.errors import DeadlineError


class Bridge:
    """Calls functions on the event loop for the engine's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._is_scheduled = False

    def post(self, call: Callable[[Any], None], value: Any) -> None:
        """From any thread: run `call(value)` on the event loop, in the order of posting."""
        self._calls.append((call, value))
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        # Cleared first: what is posted from here on schedules a run of its own, so nothing is left behind.
        self._is_scheduled = False
        while self._calls:
            call, value = self._calls.popleft()
            call(value)


class Answers:
    """The answers to one HTTP request, in the making: tokens as they come, then each one's result."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._events: asyncio.Queue[tuple[int, TokenEvent | Result | DeadlineError]] = asyncio.Queue()
        self.handles: list[Handle] = []
        self.is_cancelled = False

    def listener(self, index: int) -> OnToken:
        """What the engine calls with the tokens of answer `index`."""
        return lambda event: self._bridge.post(self._events.put_nowait, (index, event))

    def follow(self, handle: Handle) -> None:
        """The engine took the next one. Called from the thread that handed it over."""
        index = len(self.handles)
        self.handles.append(handle)
        handle.when_done(lambda result: self._bridge.post(self._events.put_nowait, (index, result)))
        if self.is_cancelled:  # the client left while the engine was given the request
            handle.cancel()

    def cancel(self) -> None:
        """Let the engine drop them within one step, and whatever is handed over from now on."""
        self.is_cancelled = True
        for handle in self.handles:
            if not handle.done():
                handle.cancel()

    async def events(self, timeout_s: float) -> AsyncIterator[tuple[int, TokenEvent | Result]]:
        """Each with the number of its answer; ends after the last result.

        Raises:
            DeadlineError: they were not complete in time.
        """
        late = DeadlineError("the answer was not complete when its time was over")
        timer = asyncio.get_running_loop().call_later(timeout_s, self._events.put_nowait, (0, late))
        left = len(self.handles)
        try:
            while left:
                index, event = await self._events.get()
                if isinstance(event, DeadlineError):
                    raise event
                left -= isinstance(event, Result)
                yield index, event
        finally:
            timer.cancel()
