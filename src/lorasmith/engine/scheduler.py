"""Which rows run in which step: admission, chunked prefill, decoding, departure.

Rows 0 … n - 1 of the cache are alive. Everything here runs on the loop's thread; other threads only
append to `waiting`, under the lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    def __init__(
        self, runner: Runner, prefix: PrefixCache, *, max_rows: int, chunk_tokens: int, exact: bool = False
    ) -> None:
        self.runner = runner
        self.prefix = prefix
        self.max_rows = max_rows
        self.chunk_tokens = prefix.block_tokens if exact else chunk_tokens
        self.exact = exact
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.lock = threading.Lock()
        self.finished: list[Row] = []
        self.merged: Generation | None = None
        self.steps = 0

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
        return self.finished

    def abort(self, message: str) -> list[Row]:
        """End every running request with an error; those that wait stay."""
        self.finished = []
        for row in self.rows:
            row.fail(message)
        self._leave()
        return self.finished

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self.rows and not self.waiting

    def _drop_cancelled(self) -> None:
        with self.lock:
            gone = [row for row in self.waiting if row.handle.is_cancelled]
            for row in gone:
                self.waiting.remove(row)
        for row in gone:
            row.cancel()
            self.finished.append(row)
        for row in self.rows:
            if row.handle.is_cancelled:
                row.cancel()
        self._leave()

    def _admit(self) -> None:
        while len(self.rows) < self.max_rows:
            with self.lock:
                if not self.waiting:
                    break
                row = self.waiting.popleft()
            number = len(self.rows)
            self.rows.append(row)
            try:
                row.filled = self.prefix.restore(row.owner, row.prompt, self.runner.cache, number)
                row.reused = row.filled
            except Exception as error:
                row.fail(_said(error))
        self._leave()
        self.runner.slots.hold([self._adapter_of(row) for row in self.rows])

    def _prefill(self, rows: list[Row]) -> None:
        for chunk in self._chunks(rows):
            outcomes = self._run_bisecting(chunk)
            for outcome in outcomes:
                outcome.row.filled += outcome.new
            done = [o for o in outcomes if o.row.filled == len(o.row.prompt)]
            self._choose(done)
            for row in (o.row for o in done):
                self.prefix.save(row.owner, row.prompt, self.runner.cache, self.rows.index(row))

    def _chunks(self, rows: list[Row]) -> list[list[Row]]:
        """Rows that prefill together in this step; in deterministic mode each one alone."""
        if self.exact:
            return [[row] for row in rows]
        chosen: list[Row] = []
        longest = 0
        for row in rows:
            longest = max(longest, min(len(row.prompt) - row.filled, self.chunk_tokens))
            if chosen and longest * (len(chosen) + 1) > self.chunk_tokens:
                break
            chosen.append(row)
        return [chosen]

    def _decode(self, rows: list[Row]) -> None:
        alone = self.exact and not self.runner.is_row_invariant
        for batch in [[row] for row in rows] if alone else [rows]:
            outcomes = self._run_bisecting(batch)
            for outcome in outcomes:
                outcome.row.filled += outcome.new
            self._choose(outcomes)

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
        if self.exact and self.runner.is_row_invariant and not rows[0].is_prefilling:
            batch, lines = self._padded_decode_batch(rows)
        else:
            batch, lines = self._batch(rows), list(range(len(rows)))
        logits = self.runner.forward(batch)
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
            routing=self.runner.slots.route([self._adapter_of(row) for row in rows], exact=self.exact),
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
        owners = [self._adapter_of(running[i]) if i in running else None for i in range(self.max_rows)]
        batch = Batch(
            tokens=torch.tensor(tokens, device=self.runner.cache.shape.device),
            rows=list(range(self.max_rows)),
            starts=[row.filled if row is not None else 0 for row in present],
            lengths=[1] * self.max_rows,
            routing=self.runner.slots.route(owners, exact=True),
        )
        return batch, list(running)

    def _adapter_of(self, row: Row) -> Generation | None:
        return None if row.generation is self.merged else row.generation

    def _new_tokens(self, row: Row) -> list[int]:
        if row.next_token is not None:
            return [row.next_token]
        return row.prompt[row.filled : row.filled + self.chunk_tokens]

    def _choose(self, outcomes: Sequence[Outcome]) -> None:
        if not outcomes:
            return
        choices = choose(_lines(outcomes), [o.row.sampler for o in outcomes])
        for outcome, choice in zip(outcomes, choices, strict=True):
            outcome.row.accept(choice)

    def _leave(self) -> None:
        """Take out rows that ended; the last row moves into the gap, so that live rows stay together."""
        number = 0
        while number < len(self.rows):
            row = self.rows[number]
            if row.finish_reason is None:
                number += 1
                continue
            self.finished.append(row)
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
