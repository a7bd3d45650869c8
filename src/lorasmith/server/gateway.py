"""`Gateway`: everything between an HTTP request and the engine, without HTTP.

One engine, whose loop has a thread of its own. Requests reach it through its thread-safe queue, tokens come
back through `Bridge`. Whatever may block (the store, tokenising, reading an adapter) runs in worker threads.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from lorasmith.bases import Base
from lorasmith.engine import Engine, OnToken, Request, Result, TokenEvent
from lorasmith.errors import (
    BudgetError,
    ConfigError,
    DeadlineError,
    EngineError,
    OverloadedError,
    UnavailableError,
)
from lorasmith.native import release_threads
from lorasmith.server.adapters import Adapters
from lorasmith.server.bridge import Answers, Bridge
from lorasmith.server.config import ServerConfig
from lorasmith.server.fairness import FairQueue, Ticket
from lorasmith.server.isolation import Check, Shadow
from lorasmith.server.keys import Keys, Tenant
from lorasmith.server.limits import Quotas
from lorasmith.server.metrics import Metrics
from lorasmith.server.names import Resolved
from lorasmith.store import Store

T = TypeVar("T")
PREPARING_THREADS = 4
LOADING_THREADS = 2
HOUSEKEEPING_S = 5.0


@dataclass(frozen=True)
class Asked:
    """A request as the API gave it: prompts as token ids, one `Request` for each choice wanted."""

    tenant: Tenant
    resolved: Resolved
    requests: Sequence[Request]
    request_id: str
    is_streamed: bool

    @property
    def tokens(self) -> int:
        """Prompts, and answers at their longest."""
        return sum(len(r.prompt) + r.max_tokens for r in self.requests)


@dataclass(eq=False)
class Running:
    """A request that has its rows. `close` must follow, however it ends."""

    asked: Asked
    ticket: Ticket
    answers: Answers
    began: float
    sent: list[Request] = field(default_factory=list)
    results: dict[int, Result] = field(default_factory=dict)
    tokens_seen: int = 0
    first_token_at: float | None = None
    last_token_at: float = 0.0
    outcome: str | None = None  # None while it runs
    is_checked: bool = False


class Gateway:
    """See the module's docstring. Its methods belong to the event loop's thread unless they say otherwise."""

    def __init__(
        self,
        base: Base,
        engine: Engine,
        store: Store,
        config: ServerConfig,
        *,
        keys: Keys | None = None,
        reference: Engine | None = None,
    ) -> None:
        self.base, self.engine, self.store, self.config = base, engine, store, config
        self.keys = keys or Keys()
        fingerprint = None if base.directory is None else base.fingerprint
        self.base_fingerprint = "" if fingerprint is None else fingerprint.digest
        self.adapters = Adapters(
            engine,
            store,
            base_id=config.base_id,
            fingerprint=fingerprint,
            allow_base_mismatch=config.allow_base_mismatch,
            max_adapters=config.max_adapters,
        )
        self.max_active_adapters = engine.scheduler.max_rows
        self.queue = FairQueue(
            engine.scheduler.max_rows + config.lookahead_rows,
            max_waiting=config.max_waiting,
            max_waiting_per_tenant=config.max_waiting_per_tenant,
        )
        self.quotas = Quotas()
        self.metrics = Metrics()
        self.metrics.watch(self)
        self.admitted: Counter[tuple[str, str, str]] = Counter()
        self.spent: dict[str, Counter[str]] = {}
        self.mismatches = 0
        self.is_draining = False
        self._running: set[Running] = set()
        self._waiting: Counter[str] = Counter()
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, "lorasmith-prepare")
        self._loading = ThreadPoolExecutor(LOADING_THREADS, "lorasmith-load")
        self._bridge: Bridge | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self.shadow: Shadow | None = None
        if config.shadow_share:
            if reference is None or not (engine.deterministic and reference.deterministic):
                raise ConfigError("shadow_share needs a serving and a reference engine in deterministic mode")
            self.shadow = Shadow(
                reference, store.lease, self._count_check,
                share=config.shadow_share, max_waiting=config.shadow_queue,
            )  # fmt: skip

    # -- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine's loop, on the present event loop."""
        self._bridge = Bridge(asyncio.get_running_loop())
        self.engine.run_forever()
        self._housekeeping = asyncio.create_task(self._keep_house())

    async def drain(self, timeout_s: float | None = None) -> None:
        """Let in nobody new, wait for who runs, and end the rest with an error."""
        self.is_draining = True
        deadline = time.monotonic() + (self.config.drain_s if timeout_s is None else timeout_s)
        while not self.queue.is_idle and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for running in self._running:
            running.answers.cancel()

    async def close(self) -> None:
        """Stop everything; the engine is closed too."""
        self.is_draining = True
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        await self.in_thread(self._close)
        self._preparing.shutdown(wait=False)
        self._loading.shutdown(wait=False)

    def _close(self) -> None:
        if self.shadow is not None:
            self.shadow.close()
        self.engine.close()
        self.adapters.close()

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine's last step began."""
        return time.monotonic() - self.engine.heartbeat

    def why_not_ready(self) -> str | None:
        """Why no request should be sent here; None if all is well."""
        if self.mismatches:
            return f"isolation: {self.mismatches} answers differ when computed alone"
        if self.is_draining:
            return "draining"
        if not self.engine.is_alive(self.config.max_silence_s):
            return f"the engine's loop made no step for {self.heartbeat_age_s:.0f} s"
        return None

    async def in_thread(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Run something that may block, off the event loop."""
        return await self._run_in(self._preparing, partial(call, *arguments, **named))

    async def _run_in(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        def work() -> T:
            try:
                return call()
            finally:
                release_threads()  # of the checks of an adapter; the engine's thread needs them

        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            await self.in_thread(self.adapters.sweep)
            known = {(v.name, str(v.version)) for v in await self.in_thread(self.store.versions)}
            running = {_label(r.asked.resolved) for r in self._running}
            self.metrics.forget(known | running | {(self.config.base_id, "")})
            self.admitted = Counter({k: n for k, n in self.admitted.items() if k[:2] in known})

    # -- one request --------------------------------------------------------------------------------

    async def admit(self, asked: Asked) -> Running:
        """Wait for a turn, load the adapter, and hand the request to the engine.

        Raises:
            UnavailableError: the server drains.
            OverloadedError: a quota is reached, or too many wait.
            DeadlineError: its time was over before its turn came.
            BudgetError, AdapterFileError, BaseMismatchError: it cannot be served.
        """
        began = time.monotonic()
        if self.is_draining:
            raise UnavailableError("this server is shutting down")
        self._check_length(asked)
        self.quotas.reserve(asked.tenant, asked.tokens)
        try:
            ticket = await self._turn(asked, began + self.config.request_timeout_s)
        except BaseException:
            self.quotas.give_back(asked.tenant, asked.tokens)
            raise
        self.metrics.queue_s.observe(time.monotonic() - began)
        assert self._bridge is not None
        running = Running(asked, ticket, Answers(self._bridge), began)
        self._running.add(running)
        try:
            await self._hand_over(running)
        except BaseException:
            self.close_running(running, "refused")
            raise
        return running

    async def events(self, running: Running) -> AsyncIterator[tuple[int, TokenEvent | Result]]:
        """All tokens of all choices as they come, each with its choice's number.

        Raises:
            DeadlineError: the time is over. EngineError: the engine could not go on.
            UnavailableError: the server stopped it.
        """
        async for index, event in running.answers.events(self.left_s(running)):
            if isinstance(event, TokenEvent):
                running.tokens_seen += 1
                running.last_token_at = time.monotonic()
                running.first_token_at = running.first_token_at or running.last_token_at
            else:
                running.results[index] = event
                self._refuse_failed(event, running)
            yield index, event

    def close_running(self, running: Running, outcome: str) -> None:
        """Give back rows and quota, count, and offer the answers to the isolation proof. Safe to repeat."""
        if running.outcome is not None:
            return
        running.outcome = outcome
        running.answers.cancel()
        self._running.discard(running)
        used = self._used_tokens(running)
        self.queue.leave(running.ticket, used)
        self.quotas.give_back(running.asked.tenant, running.asked.tokens - used)
        self._count(running, outcome)
        if running.is_checked and self.shadow is not None:
            for index, result in running.results.items():
                digest = running.asked.resolved.digest
                self.shadow.offer(Check(running.sent[index], digest, result, running.asked.request_id))

    def left_s(self, running: Running) -> float:
        """Seconds until a request's time is over."""
        return running.began + self.config.request_timeout_s - time.monotonic()

    @property
    def running(self) -> list[Running]:
        """Requests that have their rows."""
        return list(self._running)

    def adapters_in_use(self) -> tuple[list[str], list[str]]:
        """Names of the adapters that run, and of those that wait."""
        running = {r.asked.resolved.asked for r in self._running if r.asked.resolved.digest}
        return sorted(running), sorted(name for name, count in self._waiting.items() if count > 0)

    # -- inner --------------------------------------------------------------------------------------

    def _check_length(self, asked: Asked) -> None:
        for request in asked.requests:
            total, most = len(request.prompt) + request.max_tokens, self.engine.max_row_tokens
            if total > most:
                raise BudgetError(
                    f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.max_tokens}: "
                    f"{total}, but one request may hold {most} here"
                )

    async def _turn(self, asked: Asked, deadline: float) -> Ticket:
        name = asked.resolved.asked if asked.resolved.digest else ""
        self._waiting[name] += bool(name)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self.queue.enter(asked.tenant, len(asked.requests), asked.tokens)
        except TimeoutError:
            raise DeadlineError("the request waited for its turn until its time was over") from None
        finally:
            self._waiting[name] -= bool(name)

    async def _hand_over(self, running: Running) -> None:
        asked, digest = running.asked, running.asked.resolved.digest
        running.is_checked = self.shadow is not None and self.shadow.picks()
        for index, request in enumerate(asked.requests):
            sent = replace(request, adapter=digest, tenant=asked.tenant.name)
            if running.is_checked:
                sent = replace(sent, logprobs=True)
            listener = running.answers.listener(index) if asked.is_streamed else None
            running.sent.append(sent)
            await self._submit(running.answers, sent, listener, asked.resolved)
        label = (*_label(asked.resolved), digest or "")
        self.admitted[label] += len(asked.requests)

    async def _submit(
        self, answers: Answers, request: Request, on_token: OnToken | None, resolved: Resolved
    ) -> None:
        """The engine refuses a digest that it does not know, so no other weights can answer."""

        def submit() -> None:
            with self.adapters.held(resolved.digest, resolved.base):
                answers.follow(self.engine.submit(request, on_token))

        # Adapters in memory do not wait behind those that are read from the disk.
        pool = self._preparing if self.adapters.is_loaded(resolved.digest) else self._loading
        await self._run_in(pool, submit)

    def _used_tokens(self, running: Running) -> int:
        """What to charge. Whoever leaves early pays for what was computed, as far as it is known."""
        used = sum(r.prompt_tokens + len(r.token_ids) for r in running.results.values())
        unfinished = [r for i, r in enumerate(running.sent) if i not in running.results]
        if not unfinished:
            return used
        if running.asked.is_streamed:
            return used + sum(len(r.prompt) for r in unfinished) + running.tokens_seen
        return running.asked.tokens

    def _refuse_failed(self, result: Result, running: Running) -> None:
        if result.adapter_digest != running.asked.resolved.digest:
            self._count_check("mismatch")
            raise EngineError(f"answered by {result.adapter_digest}, not {running.asked.resolved.digest}")
        if result.finish_reason == "error":
            raise EngineError(result.error or "no reason given")
        if result.finish_reason == "cancelled":
            raise UnavailableError("this server is shutting down and stopped the answer")

    def _count_check(self, outcome: str) -> None:
        """From any thread."""
        self.metrics.isolation_checks.labels(outcome).inc()
        if outcome == "mismatch":
            self.metrics.isolation_mismatch.inc()
            self.mismatches += 1

    def _count(self, running: Running, outcome: str) -> None:
        label, results = _label(running.asked.resolved), running.results.values()
        self.metrics.requests.labels(*label, outcome).inc()
        generated = sum(len(r.token_ids) for r in results)
        self.metrics.prompt_tokens.labels(*label).inc(sum(r.prompt_tokens for r in results))
        self.metrics.reused_tokens.labels(*label).inc(sum(r.reused_tokens for r in results))
        self.metrics.generated_tokens.labels(*label).inc(generated)
        mine = self.spent.setdefault(running.asked.tenant.name, Counter())
        mine.update(
            requests=1,
            prompt_tokens=sum(r.prompt_tokens for r in results),
            reused_tokens=sum(r.reused_tokens for r in results),
            generated_tokens=generated or running.tokens_seen,
        )
        if running.first_token_at is None:
            return
        self.metrics.first_token_s.labels(*label).observe(running.first_token_at - running.began)
        if len(results) == 1 and generated > 1:
            spent = running.last_token_at - running.first_token_at
            self.metrics.per_token_s.labels(*label).observe(spent / (generated - 1))


def _label(resolved: Resolved) -> tuple[str, str]:
    return resolved.name, str(resolved.version or "")


def seeded(request: Request) -> Request:
    """A sampled request gets a seed of its own, so that it can be computed again."""
    if request.temperature > 0 and request.seed is None:
        return replace(request, seed=secrets.randbits(62))
    return request


def outcome_of(error: BaseException) -> str:
    """How a request that raised is counted."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "disconnected"
    known = {DeadlineError: "deadline", OverloadedError: "refused", UnavailableError: "stopped"}
    return next((name for kind, name in known.items() if isinstance(error, kind)), "failed")
