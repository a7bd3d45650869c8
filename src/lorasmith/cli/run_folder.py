"""What a training run left in its folder, read back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasmith.errors import ConfigError
from lorasmith.train import read_metrics

DEPTH = 3
NOT_COMPARED = ("versions", "commit", "base_fingerprint", "data", "layout", "policy")


@dataclass(frozen=True)
class RunFolder:
    """`record`: run.json. `rows`: metrics.jsonl. `samples`: rows of samples.jsonl, where there is one."""

    path: Path
    name: str
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss)."""
        return [(row["step"], row["loss"]) for row in self.rows if "loss" in row]

    @property
    def eval_losses(self) -> list[tuple[int, float]]:
        """(step, evaluation loss)."""
        return [(row["step"], row["eval_loss"]) for row in self.rows if "eval_loss" in row]

    @property
    def is_finished(self) -> bool:
        """Whether its result is there: a run that was stopped has checkpoints only."""
        return any((self.path / part).is_dir() for part in ("adapter", "model"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Loss of the last tenth of the steps, best evaluation loss, tokens per second, peak memory."""
        losses = [loss for _, loss in self.losses]
        last = losses[-max(1, len(losses) // 10) :]
        timed = [row for row in self.rows if "step_s" in row]
        seconds = sum(row["step_s"] for row in timed)
        return {
            "train_loss": sum(last) / len(last) if last else None,
            "eval_loss": min((loss for _, loss in self.eval_losses), default=None),
            "tokens_per_s": sum(row["tokens"] for row in timed) / seconds if seconds else None,
            "peak_rss_bytes": max((row.get("peak_rss_bytes", 0) for row in self.rows), default=None),
        }

    @property
    def progress(self) -> str:
        """`40/40`, or `12/40 stopped`."""
        total = self.record.get("steps", "?")
        return f"{self.steps}/{total}" + ("" if self.is_finished else " stopped")

    @property
    def shown(self) -> dict[str, str]:
        """The summary as text."""
        s = self.summary
        return {
            "loss": "–" if s["train_loss"] is None else f"{s['train_loss']:.4f}",
            "eval_loss": "–" if s["eval_loss"] is None else f"{s['eval_loss']:.4f}",
            "rate": "–" if s["tokens_per_s"] is None else f"{s['tokens_per_s']:,.0f}",
            "memory": "–" if not s["peak_rss_bytes"] else f"{s['peak_rss_bytes'] / 1e9:.2f} GB",
        }

    def settings(self) -> dict[str, Any]:
        """Every setting by dotted name."""
        return dict(_flat({k: v for k, v in self.record.items() if k not in NOT_COMPARED}))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "name": self.name, "path": str(self.path), "steps": self.steps, "total_steps": self.record.get("steps"),
            "is_finished": self.is_finished, **self.summary, "config": self.settings(),
        }  # fmt: skip


def find_runs(folder: Path) -> list[RunFolder]:
    """Every run in `folder` and up to three levels below it, by name.

    Raises:
        ConfigError: the folder is not there, or a run.json is damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder.")
    places = {path.parent for depth in range(DEPTH + 1) for path in folder.glob("*/" * depth + "run.json")}
    return [_read(place, folder) for place in sorted(places, key=_naturally)]


def _naturally(path: Path) -> list[tuple[int, str]]:
    """Key that puts r2 before r16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _read(place: Path, root: Path) -> RunFolder:
    try:
        record = json.loads((place / "run.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{place / 'run.json'} cannot be read: {error}.") from error
    name = place.name if place == root else str(place.relative_to(root))
    rows = [row for row in read_metrics(place / "metrics.jsonl") if isinstance(row, dict) and "step" in row]
    return RunFolder(place, name, record, rows, read_metrics(place / "samples.jsonl"))


def differences(found: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Setting → its value in each run, for those that are not the same in all."""
    all_settings = [run.settings() for run in found]
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    values = {key: [settings.get(key) for settings in all_settings] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
