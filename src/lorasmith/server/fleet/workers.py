"""The local pool: worker processes on Unix sockets, watched, restarted, chosen by rendezvous hashing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lorasmith.errors import EngineError, UnavailableError
from lorasmith.server.fleet.pool import Call, ReplicaLostError, Reply
from lorasmith.server.fleet.rendezvous import pick
from lorasmith.server.fleet.worker import WorkerSpec

LOOK_EVERY_S = 0.25
PATIENCE_S = 30.0  # at the start
MAX_FIRST_DEATHS = 2
PROBE_TIMEOUT_S = 5.0
UNREADY_S = 60.0  # a worker that was ready and is not for so long is ended, and what it holds given to others
KEPT = ("draining", "isolation")  # unless it ends by itself, or somebody must look at it
RESTART_AFTER_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # the more often it died in a row, the later
STEADY_S = 60.0  # a worker that lived as long starts afresh in that row
log = logging.getLogger("lorasmith.server")


@dataclass(eq=False)
class Worker:
    """One process, and what is known of it."""

    name: str
    socket: Path
    process: subprocess.Popen[bytes]
    client: httpx.AsyncClient
    since: float
    why_not: str | None = "starting"
    unready_since: float | None = None  # None also before it was ready once
    rows: int = 0  # that the ingress sent and has not got back
    deaths: int = 0
    restarts: int = 0
    next_start: float = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether requests may be sent to it."""
        return self.why_not is None


class Workers:
    """A `Pool` of processes of this machine.

    Args:
        rows: that each worker computes at once; `lookahead` more are sent, so that a freed row is filled at once.
        threads: of each worker.
    """

    def __init__(self, spec: WorkerSpec, count: int, *, rows: int, lookahead: int, threads: int) -> None:
        self._spec, self._room, self._threads = spec, rows + lookahead, threads
        self._folder = tempfile.TemporaryDirectory(prefix="lorasmith-")  # mode 0700: its owner's alone
        self._changed = asyncio.Event()
        self.on_change: Callable[[], None] = lambda: None
        self._watching: asyncio.Task[None] | None = None
        self._is_closing = False
        self.workers = [self._new(f"{i}") for i in range(count)]

    @property
    def rows(self) -> int:
        """Requests that may be on their way at once."""
        return self._room * sum(w.is_ready for w in self.workers)

    def why_not_ready(self) -> str | None:
        """None if at least one worker is ready."""
        if any(w.is_ready for w in self.workers):
            return None
        return "; ".join(f"worker {w.name}: {w.why_not}" for w in self.workers)

    async def start(self) -> None:
        """Begin to watch, and wait for the workers; for the last ones no longer than half a minute.

        Raises:
            EngineError: none can be started.
        """
        self._watching = asyncio.create_task(self._watch())
        patient_until = time.monotonic() + PATIENCE_S
        while not self._is_closing and not all(w.is_ready for w in self.workers):
            if any(w.is_ready for w in self.workers) and time.monotonic() > patient_until:
                return
            if all(w.deaths >= MAX_FIRST_DEATHS for w in self.workers):
                await self.close(1.0)
                raise EngineError("no worker can be started; the log has their reasons")
            await self._next_change()

    async def ask(self, call: Call, avoid: Collection[str]) -> Reply:
        """Send to the adapter's first choice that has room; a hot adapter so gets several.

        Raises:
            ReplicaLostError: the worker went away. UnavailableError: none is ready, and none becomes it.
        """
        worker = await self._choose(call, avoid)
        worker.rows += call.rows
        is_open = True

        async def close() -> None:
            nonlocal is_open
            if is_open:
                is_open = False
                worker.rows -= call.rows
                await response.aclose()

        try:
            request = worker.client.build_request(
                "POST", call.path, content=call.body, headers=call.headers()
            )
            response = await worker.client.send(request, stream=True)
        except BaseException as error:
            worker.rows -= call.rows
            if isinstance(error, httpx.TransportError):
                raise self._lost(worker, error) from error
            raise
        headers = dict(response.headers.items())
        return Reply(worker.name, response.status_code, headers, self._chunks(worker, response), close)

    async def metrics(self) -> dict[str, str]:
        """Of the workers that answer."""
        texts = await asyncio.gather(*(self._text(w) for w in self.workers))
        return {w.name: text for w, text in zip(self.workers, texts, strict=True) if text}

    def status(self) -> list[dict[str, Any]]:
        """For /admin/status."""
        return [
            {
                "worker": w.name, "ready": w.is_ready, "why_not": w.why_not,
                "pid": w.process.pid, "rows": w.rows, "restarts": w.restarts,
            }
            for w in self.workers
        ]  # fmt: skip

    async def close(self, timeout_s: float) -> None:
        """SIGTERM to all, and SIGKILL to who stays."""
        self._is_closing = True
        if self._watching is not None:
            self._watching.cancel()
        for worker in self.workers:
            await worker.client.aclose()  # first: a server that ends waits for its connections
            worker.process.terminate()
        deadline = time.monotonic() + timeout_s
        for worker in self.workers:
            await asyncio.to_thread(_end, worker.process, max(0.1, deadline - time.monotonic()))
        self._folder.cleanup()

    # -- inner --------------------------------------------------------------------------------------

    async def _choose(self, call: Call, avoid: Collection[str]) -> Worker:
        while True:
            if rows := {w.name: w.rows for w in self.workers if w.is_ready}:
                name = pick(call.resolved.digest, rows, wanted=call.rows, room=self._room, avoid=avoid)
                return next(w for w in self.workers if w.name == name)
            if self._is_closing:
                raise UnavailableError("this server is shutting down")
            await self._next_change()

    async def _next_change(self) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), 1.0)

    async def _chunks(self, worker: Worker, response: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for piece in response.aiter_raw():
                yield piece
        except httpx.TransportError as error:
            raise self._lost(worker, error) from error

    def _lost(self, worker: Worker, error: Exception) -> ReplicaLostError:
        """Nobody else is sent there until a probe succeeds."""
        why = f"{type(error).__name__}: {error}"
        self._note(worker, why)
        return ReplicaLostError(worker.name, why)

    def _note(self, worker: Worker, why_not: str | None) -> None:
        """What is known of a worker from now on; who waits for a change hears of it."""
        was_ready, worker.why_not = worker.is_ready, why_not
        if worker.is_ready == was_ready:
            return
        worker.unready_since = None if worker.is_ready else time.monotonic()
        self._changed.set()
        self.on_change()
        fields = {"worker": worker.name, "ready": worker.is_ready, "why_not": why_not}
        log.info("worker", extra={"fields": fields})

    def _new(self, name: str) -> Worker:
        socket = Path(self._folder.name) / f"{name}-{time.monotonic_ns()}.sock"
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads)}
        process = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C is for the ingress, which drains first
        )
        assert process.stdin is not None
        process.stdin.write(f"{self._spec.to_json()}\n{socket}\n".encode())
        process.stdin.flush()  # and left open: its end would tell the worker to end
        transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=None))
        client = httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=None)
        return Worker(name, socket, process, client, time.monotonic())

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "lorasmith.server.fleet.worker"]

    async def _watch(self) -> None:
        await asyncio.gather(*(self._watch_one(i) for i in range(len(self.workers))))

    async def _watch_one(self, index: int) -> None:
        while True:
            try:
                await self._look_at(self.workers[index])
            except OSError as error:  # no memory for a new process, say: later there may be
                log.error("worker not started", exc_info=error, extra={"fields": {"worker": f"{index}"}})
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look_at(self, worker: Worker) -> None:
        code = worker.process.poll()
        if code is not None:
            await self._bring_back(worker, code)
            return
        self._note(worker, await self._probe(worker))
        since = worker.unready_since
        if since is None or time.monotonic() - since < UNREADY_S or str(worker.why_not).startswith(KEPT):
            return
        log.error("worker is stuck", extra={"fields": {"worker": worker.name, "why_not": worker.why_not}})
        worker.process.kill()

    async def _probe(self, worker: Worker) -> str | None:
        """Why it takes no requests."""
        if not worker.socket.exists():
            return "starting"
        try:
            answer = await worker.client.get("/ready", timeout=PROBE_TIMEOUT_S)
            why_not = answer.json()["why_not"]
            return None if why_not is None else str(why_not)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"

    async def _bring_back(self, worker: Worker, code: int) -> None:
        now = time.monotonic()
        if not worker.next_start:
            self._note(worker, f"ended with {code}")
            worker.deaths = 0 if now - worker.since > STEADY_S else worker.deaths
            worker.next_start = now + RESTART_AFTER_S[min(worker.deaths, len(RESTART_AFTER_S) - 1)]
            log.error("worker ended", extra={"fields": {"worker": worker.name, "code": code}})
        if now < worker.next_start:
            return
        new = self._new(worker.name)
        new.deaths, new.restarts = worker.deaths + 1, worker.restarts + 1
        self.workers[self.workers.index(worker)] = new
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        worker.socket.unlink(missing_ok=True)
        await worker.client.aclose()

    async def _text(self, worker: Worker) -> str:
        try:
            answer = await worker.client.get("/metrics", timeout=PROBE_TIMEOUT_S)
        except httpx.HTTPError:
            return ""
        return answer.text if worker.is_ready else ""


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
