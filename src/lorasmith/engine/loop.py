"""The thread that steps an engine, and a second one that watches it.

A thread that hangs cannot be ended from outside. So the watchdog takes the work away from it (`recover`
fails what was in flight and makes state that the old thread does not know), and starts another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lorasmith.native import release_threads

IDLE_WAIT_S = 0.05
WATCH_EVERY_S = 0.1


class Loop:
    """Calls `step` until it is stopped.

    Args:
        step: one step; returns whether there is more to do.
        recover: called by the watchdog with the reason, after the thread died or hung.
        busy_since: `time.monotonic()` at the start of the present step; None between steps.
        stuck_after_s: a step that lasts longer is given up; None waits for ever.

    Attributes:
        work: set it when there is something to do.
        restarts: how often the watchdog had to start another thread.
    """

    def __init__(
        self,
        step: Callable[[], bool],
        recover: Callable[[str], None],
        busy_since: Callable[[], float | None],
        stuck_after_s: float | None,
    ) -> None:
        self._step = step
        self._recover = recover
        self._busy_since = busy_since
        self._stuck_after_s = stuck_after_s
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._watchdog: threading.Thread | None = None
        self._cause: BaseException | None = None
        self.work = threading.Event()
        self.restarts = 0

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped; a thread that just died is about to be replaced."""
        return self._thread is not None

    @property
    def is_alive(self) -> bool:
        """Whether its thread lives."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def start(self) -> None:
        """Start both threads, once."""
        if self._thread is not None:
            return
        self._stopping.clear()
        release_threads()  # of whoever made the engine: what they no longer do must not slow the loop down
        self._spawn()
        self._watchdog = threading.Thread(target=self._watch, name="lorasmith-watchdog", daemon=True)
        self._watchdog.start()

    def stop(self, timeout_s: float) -> bool:
        """Stop after the present step; return whether that step came to its end in time."""
        self._stopping.set()
        self.work.set()
        if self._watchdog is not None:
            self._watchdog.join(timeout_s)  # first: it may be starting another thread just now
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout_s)
        self._thread = self._watchdog = None
        return not thread.is_alive()

    def _spawn(self) -> None:
        self._cause = None
        self._thread = threading.Thread(target=self._run, name="lorasmith-engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        me = threading.current_thread()
        try:
            while not self._stopping.is_set() and self._thread is me:
                self.work.clear()
                if not self._step():
                    release_threads()  # another engine of this process may be at work
                    self.work.wait(IDLE_WAIT_S)
        except BaseException as error:  # not even SystemExit of a callback may leave requests waiting
            self._cause = error

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_EVERY_S):
            if reason := self._fault():
                self._recover(reason)
                self.restarts += 1
                self._spawn()

    def _fault(self) -> str | None:
        if not self.is_alive:
            return f"the engine's loop died ({self._cause!r}) and was started again"
        since = self._busy_since()
        if since is None or self._stuck_after_s is None or time.monotonic() - since < self._stuck_after_s:
            return None
        return (
            f"a step of the engine took longer than {self._stuck_after_s:g} s "
            "(does an on_token callback block?), so it was given up"
        )
