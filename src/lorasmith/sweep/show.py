"""How a sweep goes, on stderr: a live table on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import psutil
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from lorasmith.sweep.member import Member
    from lorasmith.sweep.sweep import Sweep

MOST_ROWS = 24
EVERY_S = 10


class Table:
    """The runs of a sweep, the best first; `quiet` shows nothing."""

    def __init__(self, job: Sweep, *, quiet: bool) -> None:
        self.job = job
        self.console = Console(stderr=True, quiet=quiet)
        self.is_live = self.console.is_terminal and not quiet
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._started_s, self._first_round = time.monotonic(), 0
        self._last_line_s = time.monotonic()

    def __enter__(self) -> Table:
        self._first_round = self.job.round
        if self.is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.is_live:
            self._live.stop()

    def update(self) -> None:
        """A round is done, or its evaluation."""
        now = time.monotonic()
        if self.is_live:
            self._live.update(self._table(), refresh=True)
        elif now - self._last_line_s > EVERY_S:
            self._last_line_s = now
            self.say(self._headline())

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def say_evaluation(self, members: Sequence[Member]) -> None:
        """The best of the runs that were just evaluated."""
        if self.is_live:
            return
        best = min(members, key=_best_loss)
        self.say(
            f"round {self.job.round}: {len(members)} evaluated, best {best.name} at {_best_loss(best):.4f}"
        )

    def _headline(self) -> str:
        job = self.job
        elapsed, done = time.monotonic() - self._started_s, job.round - self._first_round
        left = elapsed / done * (job.total - job.round) if done else math.nan
        tokens = sum(m.progress.tokens for m in job.members)
        seconds = sum(m.progress.train_s for m in job.members)
        memory = psutil.Process().memory_info().rss / 1e9
        return (
            f"sweep {job.round}/{job.total}  {len(job.alive)} of {len(job.members)} runs training  "
            f"{tokens / seconds if seconds else 0:,.0f} tokens/s  {memory:.1f} GB  {_clock(left)} left"
        )

    def _table(self) -> RichTable:
        table = RichTable(box=box.SIMPLE, title=self._headline(), title_justify="left", title_style="bold")
        table.add_column("run")
        for heading in ("step", "training loss", "held-out loss"):
            table.add_column(heading, justify="right")
        table.add_column("")
        members = sorted(self.job.members, key=_best_loss)
        for place, m in enumerate(members[:MOST_ROWS]):
            loss = sum(m.losses) / len(m.losses) if m.losses else math.nan
            style = "bold green" if place == 0 and m.progress.best_loss is not None else ""
            style = "dim" if m.status in ("stopped", "diverged") else style
            cells = (f"{m.progress.step}/{m.total}", _number(loss), _number(_best_loss(m)))
            table.add_row(m.name, *cells, m.status, style=style)
        if len(members) > MOST_ROWS:
            table.caption = f"and {len(members) - MOST_ROWS} more"
        return table


def _best_loss(member: Member) -> float:
    loss = member.progress.best_loss
    return math.inf if loss is None else loss


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _clock(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
