"""`Engine`: requests in, answers out; each row of a batch may use another adapter."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasmith.engine.generic import GenericRunner
from lorasmith.engine.loop import Loop
from lorasmith.engine.merged import MergedPath
from lorasmith.engine.prefix import Owner, PrefixCache
from lorasmith.engine.prompts import encode_prompt
from lorasmith.engine.registry import Generation, Registry
from lorasmith.engine.requests import OnToken, Request, Result
from lorasmith.engine.rows import Handle, Row
from lorasmith.engine.runner import Runner
from lorasmith.engine.runners import make_runner
from lorasmith.engine.sampling import Sampler
from lorasmith.engine.scheduler import Scheduler
from lorasmith.engine.text import TextStream
from lorasmith.errors import BudgetError, ConfigError, MergeStateError
from lorasmith.inject import check_fit
from lorasmith.lora import Adapter

DEFAULT_KV_CACHE_BYTES = 2 << 30
DEFAULT_PREFIX_CACHE_BYTES = 256 << 20
DEFAULT_STUCK_AFTER_S = 300.0
BLOCK_TOKENS = 64
FAULTS_BEFORE_QUEUE_FAILS = 3
WAIT_S = 0.2


class Engine:
    """Batched generation on one frozen base.

    Args:
        base: what `load_base` returns, or anything with `model`, `tokenizer` (or None) and `stop_token_ids`.
        max_rows: requests that run at once; others wait.
        deterministic: every row's bits are the same whatever its neighbours. Slower.
        runner: `"fast"` (Llama family), `"generic"` (any decoder with keys and values), `"solo"` (any model,
            one row and one adapter at a time), or `"auto"`, the first of them that works.
        max_context: tokens per row at most; by default what the model and `kv_cache_bytes` allow.
        kv_cache_bytes: memory for keys and values; taken as rows need it.
        prefix_cache_bytes: memory for reuse between requests that begin alike; 0 turns it off.
        chunk_tokens: prompt tokens computed in one step, so that long prompts do not stall others.
        adapter_bytes: memory for adapters that were given as paths and are idle; None keeps all.
        max_waiting: requests that may wait; None is no limit.
        pack_weights: keep a packed second copy of bfloat16 weights (CPU), which halves decoding time.
        merge_after_steps: merge an adapter that owned all traffic for this many steps; None never merges.
        stuck_after_s: a step of `run_forever` that lasts longer is given up; None waits for ever.
    """

    def __init__(
        self,
        base: Any,
        max_rows: int = 16,
        deterministic: bool = False,
        *,
        runner: str = "auto",
        max_context: int | None = None,
        kv_cache_bytes: int = DEFAULT_KV_CACHE_BYTES,
        prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES,
        chunk_tokens: int = 1024,
        adapter_bytes: int | None = None,
        max_waiting: int | None = None,
        pack_weights: bool = True,
        merge_after_steps: int | None = None,
        stuck_after_s: float | None = DEFAULT_STUCK_AFTER_S,
    ) -> None:
        if max_rows < 1 or chunk_tokens < 1:
            raise ConfigError(
                f"Engine: max_rows={max_rows}, chunk_tokens={chunk_tokens}: use at least 1 each"
            )
        if deterministic and merge_after_steps is not None:
            raise ConfigError(
                "Engine: merge_after_steps rounds otherwise than the unmerged path; "
                "leave it out in deterministic mode"
            )
        self.base = base
        self.deterministic = deterministic
        self.max_waiting = max_waiting
        made = make_runner(base.model, runner, max_rows=max_rows, exact=deterministic, pack=pack_weights)
        self.why_not_fast = made.why_not_fast
        made.runner.cache.limit(kv_cache_bytes, _smallest(max_context, made.runner.max_positions))
        self.registry = Registry(self._check, adapter_bytes)
        self.scheduler = Scheduler(
            made.runner,
            PrefixCache(prefix_cache_bytes, BLOCK_TOKENS),
            max_rows=max_rows,
            chunk_tokens=chunk_tokens,
            exact=deterministic,
        )
        self.merged = MergedPath(merge_after_steps)
        self.heartbeat = time.monotonic()
        self.failure: str | None = None
        self._base_identity = _identity(base)
        self._stop_ids = frozenset(getattr(base, "stop_token_ids", ()) or ())
        self._forgotten: list[Generation] = []
        self._faults = 0
        self._loop = Loop(self.step, self._recover, lambda: self.scheduler.busy_since, stuck_after_s)

    def add_adapter(self, name: str, adapter_or_path: Adapter | str | Path) -> str:
        """Register an adapter under `name`, or point `name` to a new one; return its content digest.

        Reading and checking happen in the calling thread; running requests keep what they started with.

        Raises:
            AdapterFileError: it cannot be read, or does not fit the base.
        """
        return self.registry.add(name, adapter_or_path)

    def add_adapters(self, adapters: Mapping[str, Adapter | str | Path]) -> dict[str, str]:
        """`add_adapter` for many at once, in less time; return name → digest.

        Raises:
            AdapterFileError: one of them cannot be used; then no name was changed.
        """
        return self.registry.add_all(adapters)

    def remove_adapter(self, name: str) -> None:
        """Forget `name` at once; its memory is free when the last request that uses it ends.

        Raises:
            UnknownAdapterError: nobody registered it.
        """
        self.registry.remove(name)

    @property
    def adapters(self) -> dict[str, str]:
        """Name → content digest."""
        return self.registry.names()

    @property
    def served_alone(self) -> dict[str, str]:
        """Name → why this adapter shares no batch: it is put on the model, one adapter at a time, more slowly."""
        return self.registry.reasons()

    @property
    def runner(self) -> Runner:
        """What computes."""
        return self.scheduler.runner

    def memory(self) -> dict[str, int]:
        """Bytes by purpose. With a base that is mapped from its file and packed, `base` is mostly not resident."""
        runner = self.runner
        return {
            "base": sum(p.numel() * p.element_size() for p in self.base.model.parameters()),
            "packed": getattr(runner, "packed_bytes", 0),
            "kv_cache": runner.cache.num_bytes,
            "prefix_cache": self.scheduler.prefix.num_bytes,
            "slots": runner.slots.num_bytes,
            "adapters": self.registry.resident_bytes,
        }

    @property
    def restarts(self) -> int:
        """How often the watchdog had to start the loop again."""
        return self._loop.restarts

    @property
    def max_row_tokens(self) -> int:
        """Prompt and answer of one request, at most."""
        return self.runner.cache.max_tokens

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Answer all requests, in their order. Nothing runs if one of them is refused.

        Raises:
            UnknownAdapterError, BudgetError, DataError: as `submit` does.
        """
        rows: list[Row] = []
        try:
            for request in requests:
                rows.append(self._row(request, None))
        except BaseException:
            for row in rows:
                self._release(row)
            raise
        self._enqueue(rows)
        for row in rows:
            while not row.handle.done():
                if self._loop.is_running:
                    row.handle.wait(WAIT_S)  # not for ever: the loop may be stopped meanwhile
                else:
                    self.step()
        return [row.handle.result() for row in rows]

    def submit(self, request: Request, on_token: OnToken | None = None) -> Handle:
        """Queue one request. `on_token` is called from the loop's thread for every token.

        Raises:
            UnknownAdapterError: nobody registered its adapter.
            BudgetError: prompt and answer do not fit a row, or too many requests wait.
            DataError: the prompt is empty or cannot be rendered.
        """
        row = self._row(request, on_token)
        try:
            self._enqueue([row], limit=self.max_waiting)
        except BudgetError:
            self._release(row)
            raise
        return row.handle

    def step(self) -> bool:
        """Run one step; return whether there is more to do."""
        while True:
            scheduler = self.scheduler
            with scheduler.step_lock:
                if scheduler is self.scheduler:  # the one we waited for may have been given up
                    return self._step(scheduler)

    def run_forever(self) -> None:
        """Start the loop in a thread of its own, and a watchdog that replaces it if it dies or hangs."""
        self._loop.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Stop the loop after its present step. Requests that did not end are cancelled."""
        if not self._loop.is_running:
            return
        if not self._loop.stop(timeout_s):
            self._recover("the engine was stopped in the middle of a step that hung")
        with self.scheduler.lock:
            left = [*self.scheduler.rows, *self.scheduler.waiting]
        for row in left:
            row.handle.is_cancelled = True
        self.step()

    def is_alive(self, max_silence_s: float = 60.0) -> bool:
        """Whether the loop runs and made a step lately; for readiness probes."""
        is_recent = time.monotonic() - self.heartbeat < max_silence_s
        return self.failure is None and self._loop.is_alive and is_recent

    def close(self) -> None:
        """Stop the loop and leave the model as it was."""
        self.stop()
        if self.failure is None:
            self.scheduler.attached.hold(self.runner, None)
            self.merged.leave(self.runner)
        if isinstance(self.runner, GenericRunner):
            self.runner.close()

    @torch.no_grad()
    def _step(self, scheduler: Scheduler) -> bool:
        scheduler.busy_since = self.heartbeat = time.monotonic()
        try:
            for row in self._advance(scheduler):
                self._finish(row)
        finally:
            scheduler.busy_since = None
        return not scheduler.is_idle

    def _advance(self, scheduler: Scheduler) -> list[Row]:
        """One step of the scheduler; a fault of the engine itself ends what runs, so that nobody hangs."""
        if self.failure is not None:
            return scheduler.abort(self.failure, and_waiting=True)
        try:
            while self._forgotten:
                scheduler.runner.slots.drop(self._forgotten.pop())
            with scheduler.lock:
                owners = [row.generation for row in (*scheduler.rows, *scheduler.waiting)]
            self.merged.before_step(scheduler, owners)
            scheduler.merged = self.merged.current
            with torch.inference_mode():
                ended = scheduler.step()
        except Exception as error:
            self._faults += 1
            said = f"engine: {type(error).__name__}: {error}"
            self._check_model(scheduler, said)
            # What fails again and again would keep those that wait for ever.
            repeats = self._faults >= FAULTS_BEFORE_QUEUE_FAILS or self.failure is not None
            return scheduler.abort(said, and_waiting=repeats)
        self._faults = 0
        self._check_model(scheduler, "an adapter could not be put on the model, or taken off")
        return ended

    def _check_model(self, scheduler: Scheduler, reason: str) -> None:
        if self.merged.is_changing or scheduler.attached.is_changing or scheduler.attached.is_broken:
            self.failure = (
                f"{reason}. The base's weights were being changed, so they cannot be trusted: "
                "load the base again and make a new Engine."
            )

    def _recover(self, reason: str) -> None:
        """Fail what is in flight and go on with state that a hanging thread does not know."""
        old = self.scheduler
        with old.lock:
            old.is_abandoned = True
            self._check_model(old, reason)
            rows = [*old.rows, *old.finished]
            try:
                self.scheduler = old.renewed()
            except Exception as error:  # no memory, mostly: then nobody may wait any longer
                self.failure = f"{reason}, and could not be replaced: {type(error).__name__}: {error}"
                rows += old.waiting
                old.waiting.clear()
        self._forgotten = []
        told = []
        for row in rows:
            if row.handle.claim():
                result = row.to_failure(reason)
                self._release(row)
                row.handle.set(result)
                told.append((row, result))
        for row, result in told:  # a listener may be what hangs, so none may hang us or another
            threading.Thread(target=_tell_end, args=(row, result), daemon=True).start()

    def _check(self, adapter: Adapter) -> str | None:
        check_fit(self.base.model, adapter)
        return self.runner.slots.why_not(adapter)

    def _row(self, request: Request, on_token: OnToken | None) -> Row:
        if self.failure is not None:
            raise MergeStateError(f"The engine serves no more requests: {self.failure}")
        prompt = encode_prompt(request.prompt, self.base.tokenizer, self.runner.vocab_size)
        total = len(prompt) + request.max_tokens
        if total > self.max_row_tokens:
            raise BudgetError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}: {total}, "
                f"but one request may hold {self.max_row_tokens} here. Shorten the prompt, lower max_tokens, "
                "or raise the engine's kv_cache_bytes or max_context."
            )
        generation = None if request.adapter is None else self.registry.lease(request.adapter)
        digest = None if generation is None else generation.digest
        return Row(
            request=request,
            prompt=prompt,
            generation=generation,
            owner=Owner(self._base_identity, digest, request.tenant),
            sampler=Sampler.of(request),
            stream=TextStream(self.base.tokenizer, request.stop),
            stop_token_ids=self._stop_ids,
            on_token=on_token,
            handle=Handle(self._loop.work.set),
        )

    def _enqueue(self, rows: Sequence[Row], limit: int | None = None) -> None:
        with self.scheduler.lock:
            waiting = self.scheduler.waiting
            if limit is not None and len(waiting) >= limit:
                raise BudgetError(f"{len(waiting)} requests wait already, {limit} may. Try again later.")
            waiting.extend(rows)
        self._loop.work.set()

    def _finish(self, row: Row) -> None:
        if not row.handle.claim():
            return  # it was given up while its thread hung
        result = row.to_result()
        self._release(row)
        row.handle.set(result)
        row.tell_end(result)

    def _release(self, row: Row) -> None:
        generation = row.generation
        if generation is not None:
            self.registry.release(generation)
            if not generation.names and not generation.leases:
                self._forgotten.append(generation)  # its slot is the loop's to empty


def _tell_end(row: Row, result: Result) -> None:
    with contextlib.suppress(BaseException):  # SystemExit too: it may be what ended the loop
        row.tell_end(result)


def _identity(base: Any) -> str:
    """What tells this base from others in the prefix cache. The cache dies with the engine."""
    return f"{type(base.model).__name__} {id(base.model)}"


def _smallest(*limits: int | None) -> int:
    return min((limit for limit in limits if limit is not None), default=1 << 20)
