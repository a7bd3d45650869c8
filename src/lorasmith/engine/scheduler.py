"""Which rows run in which step: admission, chunked prefill, decoding, departure.

Rows 0 … n - 1 of the cache are alive. Everything here runs on the loop's thread; other threads only
append to `waiting`, under the lock. What fails for one row ends that row and no other.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.engine.attached import AttachedPath
from lorasmith.engine.prefix import PrefixCache
from lorasmith.engine.registry import Generation
from lorasmith.engine.rows import Row
from lorasmith.engine.runner import Batch, Runner
from lorasmith.engine.sampling import choose


@dataclass(frozen=True)
class Outcome:
    """What a forward pass gave one row: tokens it advanced by, and its line of the logits."""

    row: Row
    new: int
    logits: Tensor
    line: int


class Scheduler:
    """Continuous batching over a runner.

    Args:
        chunk_tokens: prompt tokens computed in one step, over all rows.
        exact: deterministic mode: every row computes the same shapes whatever its neighbours.

    Attributes:
        merged: the adapter that rides in the weights now; its rows run as the plain base.
        busy_since: `time.monotonic()` at the start of the present step; None between steps.
        is_abandoned: a step hung, and another scheduler took over; this one must touch nothing more.
    """

    def __init__(
        self, runner: Runner, prefix: PrefixCache, *, max_rows: int, chunk_tokens: int, exact: bool = False
    ) -> None:
        self.runner = runner
        self.attached = AttachedPath()
        self.prefix = prefix
        self.max_rows = max_rows
        self.chunk_tokens = prefix.block_tokens if exact else chunk_tokens
        self.exact = exact
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.lock = threading.Lock()
        self.step_lock = threading.Lock()
        self.finished: list[Row] = []
        self.merged: Generation | None = None
        self.busy_since: float | None = None
        self.is_abandoned = False
        self.steps = 0
        self._admitted = 0

    def renewed(self) -> Scheduler:
        """Another scheduler for the requests that wait, with nothing that this one's thread may still write."""
        prefix = PrefixCache(self.prefix.max_bytes, self.prefix.block_tokens)
        other = Scheduler(
            self.runner.renewed(),
            prefix,
            max_rows=self.max_rows,
            chunk_tokens=self.chunk_tokens,
            exact=self.exact,
        )
        other.waiting, other.lock, other.merged = self.waiting, self.lock, self.merged
        other.attached = AttachedPath(self.attached.current)
        return other

    def step(self) -> list[Row]:
        """One step: admit, one chunk of prefill, one token for every ready row. Returns who ended."""
        self.steps += 1
        self.finished = []
        self._drop_cancelled()
        self._admit()
        prefilling = [row for row in self.rows if row.is_prefilling]
        if prefilling:
            self._prefill(prefilling)
        fresh = set(map(id, prefilling))
        ready = [row for row in self.rows if not row.is_prefilling and id(row) not in fresh]
        if ready:
            self._decode(ready)
        self._leave()
        if not self.rows and self.attached.current is not None and not self.is_abandoned:
            self.attached.hold(self.runner, None)  # nobody is to find an adapter on an idle base
        return self.finished

    def abort(self, message: str, *, and_waiting: bool = False) -> list[Row]:
        """End every running request with an error; those that wait stay, unless they are named too."""
        ended, self.rows, self.finished = [*self.finished, *self.rows], [], []
        if and_waiting:
            with self.lock:
                ended += self.waiting
                self.waiting.clear()
        for row in ended:
            if row.finish_reason is None:
                row.fail(message)
        with contextlib.suppress(Exception):
            for number in range(self.max_rows):
                self.runner.cache.clear(number)
        return ended

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self.rows and not self.waiting

    def _drop_cancelled(self) -> None:
        with self.lock:
            gone = [row for row in self.waiting if row.handle.is_cancelled and not self.is_abandoned]
            for row in gone:
                self.waiting.remove(row)
                self.finished.append(row)
        for row in gone:
            row.cancel()
        for row in self.rows:
            if row.handle.is_cancelled:
                row.cancel()
        self._leave()

    def _admit(self) -> None:
        while len(self.rows) < self.max_rows:
            with self.lock:
                if not self.waiting or self.is_abandoned:
                    break
                row = self.waiting.popleft()
                self.rows.append(row)
            self._admitted += 1
            row.order = self._admitted
            try:
                self._restore(row, len(self.rows) - 1)
            except Exception as error:
                row.fail(_said(error))
        self._leave()
        try:
            self.runner.slots.hold([self._stacked(row) for row in self.rows])
        except Exception:
            self._fail_unplaceable()

    def _restore(self, row: Row, number: int) -> None:
        if not self.runner.is_solo:
            row.filled = row.reused = self.prefix.restore(row.owner, row.prompt, self.runner.cache, number)

    def _fail_unplaceable(self) -> None:
        """Find the adapters that cannot be brought into slots, and end the requests that use them."""
        placed: list[Generation | None] = []
        for row in self.rows:
            try:
                self.runner.slots.hold([*placed, self._stacked(row)])
                placed.append(self._stacked(row))
            except Exception as error:
                row.fail(_said(error))
        self._leave()

    def _prefill(self, rows: list[Row]) -> None:
        for chunk in self._chunks(rows):
            outcomes = self._run_bisecting(chunk)
            for outcome in outcomes:
                outcome.row.filled += outcome.new
            done = [o for o in outcomes if o.row.filled == len(o.row.prompt)]
            self._choose(done)
            if not self.runner.is_solo:
                for row in (o.row for o in done if o.row.error is None):
                    self._save(row)

    def _save(self, row: Row) -> None:
        try:
            self.prefix.save(row.owner, row.prompt, self.runner.cache, self.rows.index(row))
        except Exception as error:
            row.fail(_said(error))

    def _chunks(self, rows: list[Row]) -> list[list[Row]]:
        """Rows that prefill together in this step; in deterministic mode each one alone."""
        if self.exact:
            return [[row] for row in rows]
        oldest = min(rows, key=lambda row: row.order)
        sharing = next(batch for batch in self._batches(rows) if oldest in batch)
        chosen: list[Row] = []
        longest = 0
        for row in sorted(sharing, key=lambda row: row.order):
            longest = max(longest, min(len(row.prompt) - row.filled, self.chunk_tokens))
            if chosen and longest * (len(chosen) + 1) > self.chunk_tokens:
                break
            chosen.append(row)
        return [chosen]

    def _decode(self, rows: list[Row]) -> None:
        for batch in self._batches(rows):
            outcomes = self._run_bisecting(batch)
            for outcome in outcomes:
                outcome.row.filled += outcome.new
            self._choose(outcomes)

    def _batches(self, rows: list[Row]) -> list[list[Row]]:
        """Rows that may share a forward pass; first those of the adapter that the model carries already."""
        groups: dict[Generation | None, list[Row]] = {self.attached.current: []}
        for row in rows:
            groups.setdefault(self._attached(row), []).append(row)
        batches = []
        for generation, group in groups.items():
            shares = self.runner.is_row_invariant if generation is None else False
            alone = self.runner.is_solo or (self.exact and not shares)
            batches += [[row] for row in group] if alone else [group]
        return [batch for batch in batches if batch]

    def _run_bisecting(self, rows: list[Row]) -> list[Outcome]:
        """Run the rows together. If that fails, run halves, until the row that fails is alone."""
        try:
            return self._run(rows)
        except Exception as error:
            if len(rows) == 1:
                rows[0].fail(_said(error))
                return []
        half = len(rows) // 2
        return self._run_bisecting(rows[:half]) + self._run_bisecting(rows[half:])

    def _run(self, rows: list[Row]) -> list[Outcome]:
        if self.is_abandoned:
            raise RuntimeError("another thread took over")
        runner = self.attached.hold(self.runner, self._attached(rows[0]))
        if self.exact and runner.is_row_invariant and not rows[0].is_prefilling:
            batch, lines = self._padded_decode_batch(rows)
        else:
            batch, lines = self._batch(rows), list(range(len(rows)))
        logits = runner.forward(batch)
        return [Outcome(r, batch.lengths[i], logits, i) for r, i in zip(rows, lines, strict=True)]

    def _batch(self, rows: list[Row]) -> Batch:
        numbers = {id(row): number for number, row in enumerate(self.rows)}
        pieces = [self._new_tokens(row) for row in rows]
        width = max(map(len, pieces))
        tokens = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces])
        return Batch(
            tokens=tokens.to(self.runner.cache.shape.device),
            rows=[numbers[id(row)] for row in rows],
            starts=[row.filled for row in rows],
            lengths=list(map(len, pieces)),
            routing=self.runner.slots.route([self._stacked(row) for row in rows], exact=self.exact),
        )

    def _padded_decode_batch(self, rows: list[Row]) -> tuple[Batch, list[int]]:
        """All rows of the cache, alive or not: the shape never changes.

        A row that only fills the shape writes to its next position, which is written again before
        it is ever read.
        """
        lines = {id(row): number for number, row in enumerate(self.rows)}
        running = {lines[id(row)]: row for row in rows}
        present = [self.rows[i] if i < len(self.rows) else None for i in range(self.max_rows)]
        tokens = [[running[i].next_token] if i in running else [0] for i in range(self.max_rows)]
        owners = [self._stacked(running[i]) if i in running else None for i in range(self.max_rows)]
        batch = Batch(
            tokens=torch.tensor(tokens, device=self.runner.cache.shape.device),
            rows=list(range(self.max_rows)),
            starts=[row.filled if row is not None else 0 for row in present],
            lengths=[1] * self.max_rows,
            routing=self.runner.slots.route(owners, exact=True),
        )
        return batch, list(running)

    def _stacked(self, row: Row) -> Generation | None:
        """The adapter that the slots hold for this row, if any."""
        generation = row.generation
        return None if generation is None or generation is self.merged or generation.why_alone else generation

    def _attached(self, row: Row) -> Generation | None:
        """The adapter that the model must carry for this row, if any."""
        generation = row.generation
        return (
            generation
            if generation is not None and generation is not self.merged and generation.why_alone
            else None
        )

    def _new_tokens(self, row: Row) -> list[int]:
        if row.next_token is not None:
            return [row.next_token]
        end = None if self.runner.is_solo else row.filled + self.chunk_tokens
        return row.prompt[row.filled : end]

    def _choose(self, outcomes: Sequence[Outcome]) -> None:
        if not outcomes:
            return
        choices = choose(_lines(outcomes), [o.row.sampler for o in outcomes])
        for outcome, choice in zip(outcomes, choices, strict=True):
            try:
                outcome.row.accept(choice)
            except Exception as error:  # a tokenizer may refuse to decode what was chosen
                outcome.row.fail(_said(error))

    def _leave(self) -> None:
        """Take out rows that ended; the last row moves into the gap, so that live rows stay together."""
        number = 0
        while number < len(self.rows):
            row = self.rows[number]
            if row.finish_reason is None:
                number += 1
                continue
            self.finished.append(row)
            if row.finish_reason in ("error", "cancelled"):
                # It may have left numbers that are not finite, and masked or not, 0 · NaN is NaN.
                self.runner.cache.clear(number)
            last = self.rows.pop()
            if last is not row:
                self.runner.cache.move(len(self.rows), number, last.filled)
                self.rows[number] = last


def _lines(outcomes: Sequence[Outcome]) -> Tensor:
    """The logits of the rows as one tensor: the batch's own where it holds just these rows, in order."""
    batch = outcomes[0].logits
    if all(o.logits is batch for o in outcomes):
        lines = [o.line for o in outcomes]
        return batch if lines == list(range(batch.shape[0])) else batch[lines]
    return torch.stack([o.logits[o.line] for o in outcomes])


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
