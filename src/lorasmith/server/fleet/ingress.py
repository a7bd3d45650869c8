"""`Ingress`: what is decided once for all replicas, and the retries that make a lost replica nobody's trouble."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lorasmith.errors import DeadlineError, EngineError, UnavailableError
from lorasmith.server.config import ServerConfig
from lorasmith.server.fairness import FairQueue, Ticket
from lorasmith.server.fleet.meter import Meter
from lorasmith.server.fleet.metrics import FleetMetrics
from lorasmith.server.fleet.pool import DIGEST, Call, Pool, ReplicaLostError, Reply
from lorasmith.server.keys import Keys
from lorasmith.server.limits import Quotas
from lorasmith.server.names import Names
from lorasmith.store import BaseFacts, Store

T = TypeVar("T")
MAX_TRIES = 5
BETWEEN_TRIES_S = 0.1


@dataclass(eq=False)
class Passing:
    """A request between its client and a replica. `Ingress.leave` must follow, however it ends."""

    call: Call
    ticket: Ticket
    began: float
    meter: Meter
    reply: Reply | None = None
    first: bytes = b""
    outcome: str | None = None  # None while it runs
    tries: list[str] = field(default_factory=list)


class Ingress:
    """See the module's docstring. Its methods belong to the event loop's thread.

    Args:
        tokenizer: of the base: quotas are reserved before a replica reads the prompt.
        facts: what an upload must fit.
    """

    def __init__(
        self, pool: Pool, store: Store, config: ServerConfig, *, keys: Keys, tokenizer: Any, facts: BaseFacts | None
    ) -> None:  # fmt: skip
        self.pool, self.store, self.config, self.keys = pool, store, config, keys
        self.tokenizer, self.facts = tokenizer, facts
        self.names = Names(store, base_id=config.base_id)
        self.queue = FairQueue(
            max(1, pool.rows),
            max_waiting=config.max_waiting,
            max_waiting_per_tenant=config.max_waiting_per_tenant,
        )
        self.quotas = Quotas()
        self.metrics = FleetMetrics(self)
        self.is_draining = False
        self.running: set[Passing] = set()
        self.waiting: Counter[str] = Counter()

    # -- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the replicas."""
        self.pool.on_change = lambda: self.queue.resize(max(1, self.pool.rows))
        await self.pool.start()

    async def drain(self, timeout_s: float | None = None) -> None:
        """Let in nobody new, and wait for who runs."""
        self.is_draining = True
        deadline = time.monotonic() + (self.config.drain_s if timeout_s is None else timeout_s)
        while not self.queue.is_idle and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End the replicas; what they still do gets a moment."""
        self.is_draining = True
        await self.pool.close(5.0)

    def why_not_ready(self) -> str | None:
        """Why no request should be sent here; None if all is well."""
        return "draining" if self.is_draining else self.pool.why_not_ready()

    async def in_thread(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Run something that may block, off the event loop."""
        return await asyncio.to_thread(call, *arguments, **named)

    # -- one request --------------------------------------------------------------------------------

    async def admit(self, call: Call) -> Passing:
        """Wait for a turn and for a replica's first word.

        Raises:
            UnavailableError: the server drains, or no replica could take it. OverloadedError: a quota is
            reached, or too many wait. DeadlineError: its time was over. EngineError: a replica answered
            with another adapter than the one that was asked for.
        """
        began = time.monotonic()
        if self.is_draining:
            raise UnavailableError("this server is shutting down")
        self.quotas.reserve(call.tenant, call.tokens)
        try:
            ticket = await self._turn(call, began + self.config.request_timeout_s)
        except BaseException:
            self.quotas.give_back(call.tenant, call.tokens)
            raise
        passing = Passing(call, ticket, began, Meter(wants_usage=call.wants_usage))
        self.running.add(passing)
        try:
            await self._reach(passing)
        except BaseException as error:
            await self.leave(passing, "stopped" if isinstance(error, UnavailableError) else "failed")
            raise
        return passing

    async def pieces(self, passing: Passing) -> AsyncIterator[bytes]:
        """The answer as it comes.

        Raises:
            UnavailableError: the replica went away in the middle. Its tokens are with the client already, so
            nobody can be asked again.
        """
        assert passing.reply is not None
        meter = passing.meter
        if passing.first:
            yield passing.first
        try:
            async for piece in passing.reply.chunks:
                if out := meter.feed(piece):
                    yield out
            if meter.ending is None:
                raise ReplicaLostError(passing.reply.replica, "it ended the stream early")
        except ReplicaLostError as lost:
            self.metrics.broken.inc()
            raise UnavailableError("the replica that made this answer went away") from lost

    async def leave(self, passing: Passing, outcome: str) -> None:
        """Give back rows and quota, and count. Safe to repeat."""
        if passing.outcome is not None:
            return
        passing.outcome = outcome
        self.running.discard(passing)
        used = self._used_tokens(passing)
        self.queue.leave(passing.ticket, used)
        self.quotas.give_back(passing.call.tenant, passing.call.tokens - used)
        self.metrics.requests.labels(outcome).inc()
        if passing.reply is not None:
            await passing.reply.close()

    def left_s(self, passing: Passing) -> float:
        """Seconds until a request's time is over."""
        return passing.began + self.config.request_timeout_s - time.monotonic()

    # -- inner --------------------------------------------------------------------------------------

    async def _turn(self, call: Call, deadline: float) -> Ticket:
        name = call.resolved.asked if call.resolved.digest else ""
        self.waiting[name] += bool(name)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self.queue.enter(call.tenant, call.rows, call.tokens)
        except TimeoutError:
            raise DeadlineError("the request waited for its turn until its time was over") from None
        finally:
            self.waiting[name] -= bool(name)
            self.waiting += Counter()  # drops what is zero

    async def _reach(self, passing: Passing) -> None:
        """Ask replicas until one begins to answer. Nothing was passed on yet, so asking again harms nobody."""
        try:
            async with asyncio.timeout(self.left_s(passing)):
                while True:
                    try:
                        return await self._ask(passing)
                    except ReplicaLostError as lost:
                        passing.tries.append(lost.replica)
                        self.metrics.retries.inc()
                        if len(passing.tries) >= MAX_TRIES:
                            raise
                        await asyncio.sleep(BETWEEN_TRIES_S * len(passing.tries))
        except TimeoutError:
            raise DeadlineError("no replica answered in time") from None

    async def _ask(self, passing: Passing) -> None:
        call = passing.call
        passing.meter = Meter(wants_usage=call.wants_usage)  # nothing of what a lost replica began
        reply = await self.pool.ask(call, passing.tries)
        try:
            if reply.status == 503:
                raise ReplicaLostError(reply.replica, "it takes nothing now")
            self._refuse_wrong(call, reply)
            passing.first = await self._first(passing, reply)
        except BaseException:
            await reply.close()
            raise
        passing.reply = reply

    async def _first(self, passing: Passing, reply: Reply) -> bytes:
        """A stream up to its first word, or a whole answer."""
        call, meter = passing.call, passing.meter
        if reply.status != 200 or not call.is_streamed:
            body = b"".join([piece async for piece in reply.chunks])
            if reply.status == 200:
                meter.read(body)
            return body
        held = b""
        async for piece in reply.chunks:
            held += meter.feed(piece)
            if meter.events > call.opening_events:
                return held
        raise ReplicaLostError(reply.replica, "it ended the stream before it began")

    def _refuse_wrong(self, call: Call, reply: Reply) -> None:
        """An answer says which adapter made it; any other than the one asked for goes to nobody."""
        if reply.status != 200:
            return
        found = reply.headers.get(DIGEST)
        if found != (call.resolved.digest or "none"):
            self.metrics.wrong.inc()
            raise EngineError(f"replica {reply.replica} answered by {found}, not {call.resolved.digest}")

    def _used_tokens(self, passing: Passing) -> int:
        """What to charge. Whoever leaves a stream early pays for the events that were read."""
        if passing.meter.used_tokens is not None:
            return passing.meter.used_tokens
        if passing.reply is None or passing.reply.status != 200:
            return 0
        return min(passing.call.tokens, passing.meter.events) if passing.call.is_streamed else 0
