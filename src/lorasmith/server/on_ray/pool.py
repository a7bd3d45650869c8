"""The pool whose replicas are Ray's."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from lorasmith.errors import EngineError
from lorasmith.server.fleet.pool import Call, ReplicaLostError, Reply
from lorasmith.server.fleet.rendezvous import pick

LOOK_EVERY_S = 0.5
LOOK_TIMEOUT_S = 5.0
log = logging.getLogger("lorasmith.server")


class RayPool:
    """A `Pool` behind a handle to the `Replica` deployment.

    Args:
        room: rows that each replica gets at once.
        most: replicas that autoscaling may make.
    """

    def __init__(self, handle: Any, *, room: int, most: int) -> None:
        self._handle, self._room, self._most = handle, room, most
        self._found: list[dict[str, Any]] = []
        self._rows: Counter[str] = Counter()
        self._watching: asyncio.Task[None] | None = None
        self._trouble = ""
        self.on_change: Callable[[], None] = lambda: None

    @property
    def rows(self) -> int:
        """Requests that may be on their way at once.

        While Ray may add a replica, as many more as one holds: its autoscaler sees that they are too many.
        """
        ready = sum(bool(r["ready"]) for r in self._found)
        return self._room * min(ready + 1, self._most)

    def why_not_ready(self) -> str | None:
        """None if at least one replica is ready."""
        if any(r["ready"] for r in self._found):
            return None
        return "; ".join(f"replica {r['worker']}: {r['why_not']}" for r in self._found) or "no replica runs"

    async def start(self) -> None:
        """Begin to look after the replicas; Ray starts them."""
        self._watching = asyncio.create_task(self._watch())

    async def ask(self, call: Call, avoid: Collection[str]) -> Reply:
        """Send to the adapter's first choice that has room, as local workers do.

        Raises:
            ReplicaLostError: it went away.
        """
        while not (rows := {r["worker"]: self._rows[r["worker"]] for r in self._found if r["ready"]}):
            await asyncio.sleep(LOOK_EVERY_S)
        name = pick(call.resolved.digest, rows, wanted=call.rows, room=self._room, avoid=avoid)
        pieces = self._handle.options(stream=True).answer.remote(name, call.path, call.body, call.headers())
        self._rows[name] += call.rows
        is_open = True

        async def close() -> None:
            nonlocal is_open
            if is_open:
                is_open = False
                self._rows[name] -= call.rows
                pieces.cancel()

        try:
            found, status, headers = await anext(pieces)
        except BaseException as error:
            await close()
            raise self._told(error, name) from error
        return Reply(found, status, headers, self._chunks(pieces, found), close)

    async def metrics(self) -> dict[str, str]:
        """As of the last look."""
        return {r["worker"]: r["metrics"] for r in self._found}

    def status(self) -> list[dict[str, Any]]:
        """For /admin/status."""
        return [
            {k: v for k, v in r.items() if k != "metrics"} | {"rows": self._rows[r["worker"]]}
            for r in self._found
        ]

    async def close(self, timeout_s: float) -> None:
        """Stop looking; Ray ends the replicas."""
        if self._watching is not None:
            self._watching.cancel()

    # -- inner --------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            before = self.rows
            try:
                self._found, trouble = await self._look(), ""
            except TimeoutError as error:  # one of them is silent; Ray's health check will find it
                trouble = str(error)
            except Exception as error:  # none runs
                self._found, trouble = [], f"{type(error).__name__}: {error}"
            if trouble != self._trouble:
                self._trouble = trouble
                log.warning("replicas unseen", extra={"fields": {"error": trouble or "seen again"}})
            self._rows += Counter()  # drops the replicas that have none
            if self.rows != before:
                self.on_change()
                log.info("replicas", extra={"fields": {"rows": self.rows}})
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self) -> list[dict[str, Any]]:
        asked = self._handle.broadcast("about")
        found = await asked.results_async(timeout_s=LOOK_TIMEOUT_S, return_exceptions=True)
        return sorted((r for r in found if isinstance(r, dict)), key=lambda r: str(r["worker"]))

    async def _chunks(self, pieces: Any, name: str) -> AsyncIterator[bytes]:
        try:
            async for piece in pieces:
                yield piece
        except Exception as error:
            raise self._told(error, name) from error

    def _told(self, error: BaseException, name: str) -> BaseException:
        """Ray's errors in our words. One that the replica itself raised would come again elsewhere."""
        if isinstance(error, RayTaskError):
            return EngineError(f"replica {name}: {error.cause}")
        if isinstance(error, RayError | RayServeException | StopAsyncIteration):
            self._found = [r for r in self._found if r["worker"] != name]  # until a look finds it again
            self.on_change()
            return ReplicaLostError(name, type(error).__name__)
        return error
