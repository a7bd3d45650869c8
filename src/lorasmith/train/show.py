"""Progress on stderr: a bar with loss, rate, memory and ETA on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Show:
    """Shows how a run goes; `quiet` shows nothing."""

    def __init__(self, total: int, *, start: int = 0, quiet: bool = False, label: str = "train") -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.total, self.label = total, label
        self.is_live = self.console.is_terminal and not quiet
        self._last_line_s = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TextColumn("{task.fields[memory]:.1f} GB"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.is_live,
        )
        self._task: TaskID = self._bar.add_task(
            label, total=total, completed=start, loss=float("nan"), rate=0.0, memory=0.0
        )

    def __enter__(self) -> Show:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, *, loss: float, rate: float) -> None:
        """One optimizer step is done."""
        memory = psutil.Process().memory_info().rss / 1e9
        self._bar.update(self._task, completed=step, loss=loss, rate=rate, memory=memory)
        now = time.monotonic()
        if not self.is_live and (step == self.total or now - self._last_line_s > 10):
            self._last_line_s = now
            self.say(
                f"{self.label} {step}/{self.total}  loss {loss:.3f}  {rate:,.0f} tokens/s  {memory:.1f} GB"
            )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux counts it for each program (VmHWM); `ru_maxrss` there is at least what the process that started it held.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
