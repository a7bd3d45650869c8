"""`Engine`: requests in, answers out; each row of a batch may use another adapter."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasmith.engine.generic import GenericRunner
from lorasmith.engine.llama import LlamaRunner, why_not_fast
from lorasmith.engine.merged import MergedPath
from lorasmith.engine.prefix import Owner, PrefixCache
from lorasmith.engine.prompts import encode_prompt
from lorasmith.engine.registry import Generation, Registry
from lorasmith.engine.requests import OnToken, Request, Result
from lorasmith.engine.rows import Handle, Row
from lorasmith.engine.runner import Runner
from lorasmith.engine.sampling import Sampler
from lorasmith.engine.scheduler import Scheduler
from lorasmith.engine.text import TextStream
from lorasmith.errors import AdapterFileError, BudgetError, ConfigError
from lorasmith.inject import check_fit
from lorasmith.lora import Adapter

DEFAULT_KV_CACHE_BYTES = 2 << 30
DEFAULT_PREFIX_CACHE_BYTES = 256 << 20
BLOCK_TOKENS = 64
IDLE_WAIT_S = 0.05


class Engine:
    """Batched generation on one frozen base.

    Args:
        base: what `load_base` returns, or anything with `model`, `tokenizer` (or None) and `stop_token_ids`.
        max_rows: requests that run at once; others wait.
        deterministic: every row's bits are the same whatever its neighbours. Slower.
        runner: `"fast"` (Llama family), `"generic"` (any decoder), or `"auto"`.
        max_context: tokens per row at most; by default what the model and `kv_cache_bytes` allow.
        kv_cache_bytes: memory for keys and values; taken as rows need it.
        prefix_cache_bytes: memory for reuse between requests that begin alike; 0 turns it off.
        chunk_tokens: prompt tokens computed in one step, so that long prompts do not stall others.
        adapter_bytes: memory for adapters that were given as paths and are idle; None keeps all.
        max_waiting: requests that may wait; None is no limit.
        pack_weights: keep a packed second copy of bfloat16 weights (CPU), which halves decoding time.
        merge_after_steps: merge an adapter that owned all traffic for this many steps; None never merges.
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
        self.runner = _make_runner(base.model, runner, max_rows, deterministic, pack_weights)
        self.runner.cache.limit(kv_cache_bytes, _smallest(max_context, self.runner.max_positions))
        self.registry = Registry(self._check, adapter_bytes)
        self.scheduler = Scheduler(
            self.runner,
            PrefixCache(prefix_cache_bytes, BLOCK_TOKENS),
            max_rows=max_rows,
            chunk_tokens=chunk_tokens,
            exact=deterministic,
        )
        self.merged = MergedPath(self.runner, merge_after_steps)
        self.heartbeat = time.monotonic()
        self._base_identity = _identity(base)
        self._stop_ids = frozenset(getattr(base, "stop_token_ids", ()) or ())
        self._forgotten: list[Generation] = []
        self._step_lock = threading.Lock()
        self._work = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.restarts = 0

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
        while self._thread is None and not all(row.handle.done() for row in rows):
            self.step()
        return [row.handle.result() for row in rows]

    def submit(self, request: Request, on_token: OnToken | None = None) -> Handle:
        """Queue one request. `on_token` is called from the loop's thread for every token.

        Raises:
            UnknownAdapterError: nobody registered its adapter.
            BudgetError: prompt and answer do not fit a row, or too many requests wait.
            DataError: the prompt is empty or cannot be rendered.
        """
        with self.scheduler.lock:
            waiting = len(self.scheduler.waiting)
        if self.max_waiting is not None and waiting >= self.max_waiting:
            raise BudgetError(f"{waiting} requests wait already, {self.max_waiting} may. Try again later.")
        row = self._row(request, on_token)
        self._enqueue([row])
        return row.handle

    @torch.no_grad()
    def step(self) -> bool:
        """Run one step; return whether there is more to do."""
        with self._step_lock:
            self.heartbeat = time.monotonic()
            scheduler = self.scheduler
            with scheduler.lock:
                owners = [row.generation for row in (*scheduler.rows, *scheduler.waiting)]
            while self._forgotten:
                self.runner.slots.drop(self._forgotten.pop())
            self.merged.before_step(owners)
            scheduler.merged = self.merged.current
            with torch.inference_mode():
                try:
                    ended = scheduler.step()
                except Exception as error:  # a fault of the engine, not of one row: nobody may hang
                    ended = [
                        *scheduler.finished,
                        *scheduler.abort(f"engine: {type(error).__name__}: {error}"),
                    ]
            for row in ended:
                self._finish(row)
            return not scheduler.is_idle

    def run_forever(self) -> None:
        """Start the loop in a thread of its own; it is started again if it dies."""
        if self._thread is not None:
            return
        self._stopping.clear()
        self._thread = threading.Thread(target=self._supervise, name="lorasmith-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Stop the loop after its present step. Requests that did not end are cancelled."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping.set()
        self._work.set()
        thread.join(timeout_s)
        with self.scheduler.lock:
            left = [*self.scheduler.rows, *self.scheduler.waiting]
        for row in left:
            row.handle.is_cancelled = True
        self.step()

    def is_alive(self, max_silence_s: float = 60.0) -> bool:
        """Whether the loop runs and made a step lately; for readiness probes."""
        is_running = self._thread is not None and self._thread.is_alive()
        return is_running and time.monotonic() - self.heartbeat < max_silence_s

    def close(self) -> None:
        """Stop the loop and leave the model as it was."""
        self.stop()
        self.merged.leave()
        if isinstance(self.runner, GenericRunner):
            self.runner.close()

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            try:
                self._loop()
            except Exception:  # step() contains faults of requests; this is the last resort
                self.restarts += 1
                time.sleep(IDLE_WAIT_S)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._work.clear()
            if not self.step():
                self._work.wait(IDLE_WAIT_S)

    def _check(self, adapter: Adapter) -> None:
        check_fit(self.base.model, adapter)
        if adapter.biases:
            raise AdapterFileError(
                f"The adapter also trained {len(adapter.biases)} biases, which the engine does not serve "
                "unmerged. Merge it into a model of its own (lorasmith merge)."
            )
        if beyond := adapter.beyond_linear:
            raise AdapterFileError(
                f"The adapter also holds {beyond}, and the engine serves factors of linear layers only. "
                "Merge it into a model of its own (lorasmith merge)."
            )

    def _row(self, request: Request, on_token: OnToken | None) -> Row:
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
            handle=Handle(self._work.set),
        )

    def _enqueue(self, rows: Sequence[Row]) -> None:
        with self.scheduler.lock:
            self.scheduler.waiting.extend(rows)
        self._work.set()

    def _finish(self, row: Row) -> None:
        result = row.to_result()
        self._release(row)
        row.handle.set(result)

    def _release(self, row: Row) -> None:
        generation = row.generation
        if generation is not None:
            self.registry.release(generation)
            if not generation.names and not generation.leases:
                self._forgotten.append(generation)  # its slot is the loop's to empty


def _make_runner(model: Any, kind: str, max_rows: int, deterministic: bool, pack: bool) -> Runner:
    if kind not in ("auto", "fast", "generic"):
        raise ConfigError(f'Engine: runner="{kind}" is unknown: use "auto", "fast" or "generic"')
    reason = why_not_fast(model)
    if kind == "fast" and reason:
        raise ConfigError(f'Engine: runner="fast" cannot run this base: {reason}. Use "generic" or "auto".')
    if kind == "generic" or reason:
        return GenericRunner(model, max_rows=max_rows, exact=deterministic)
    return LlamaRunner(model, max_rows=max_rows, pack=pack, exact=deterministic)


def _identity(base: Any) -> str:
    """What tells this base from others in the prefix cache. The cache dies with the engine."""
    return f"{type(base.model).__name__} {id(base.model)}"


def _smallest(*limits: int | None) -> int:
    return min((limit for limit in limits if limit is not None), default=1 << 20)
