"""`SweepResult`: what a sweep reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SweepResult:
    """Result of `sweep`.

    Attributes:
        runs: outcome of each run, the best first: name, config, eval_loss, adapter_dir, ….
        best: name of the first of them.
        peak_rss_bytes: of the process that needed most.
        interrupted: a signal stopped the sweep; it goes on with `resume=True`.
    """

    runs: list[dict[str, Any]]
    best: str | None
    plot: Path | None
    wall_s: float
    peak_rss_bytes: int
    resumed_from_step: int | None = None
    interrupted: bool = False
    processes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return vars(self) | {"plot": str(self.plot) if self.plot else None}
