"""Raw predictions on disk, with the scores they were given; and scoring them again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.claims.quality.arms import Data
from lorasmith.claims.quality.scores import MEASURES
from lorasmith.claims.quality.tasks import data_of
from lorasmith.errors import DataError

FOLDER, SCORES = "predictions", "scores.json"
TOLERANCE = 1e-6
"""Scores are stored with six digits behind the point."""


@dataclass(frozen=True)
class Rescored:
    """One metric of one file of predictions: what was stored, what it is now; None where it is missing."""

    file: str
    metric: str
    stored: float | None
    now: float | None

    @property
    def agrees(self) -> bool:
        """Whether both are the same number."""
        if self.stored is None or self.now is None:
            return False
        return abs(self.stored - self.now) <= TOLERANCE


def keep_predictions(folder: Path, data: Data, runs: Mapping[str, Sequence[str]], *, quick: bool) -> None:
    """Write `folder/predictions/TASK-RUN.jsonl` for each run, and its scores into `scores.json` there."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    path = place / SCORES
    stored = json.loads(path.read_text()) if path.exists() else {}
    for name, outputs in runs.items():
        file = f"{data.task}-{name}.jsonl"
        lines = [{"prompt": row["prompt"], "output": o} for row, o in zip(data.test, outputs, strict=True)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (place / file).write_text(text, encoding="utf-8")
        stored[file] = {"task": data.task, "quick": quick, "data": data.digest}
        stored[file]["scores"] = MEASURES[data.task].all(outputs, data.test)
    path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def rescore(record_dir: Path) -> list[Rescored]:
    """Score the raw predictions of a record again, beside the numbers stored with it.

    Args:
        record_dir: what `lorasmith claims --out` wrote; predictions may be gzipped (`.jsonl.gz`).

    Raises:
        DataError: there are none, a file is missing or unreadable, or the shipped test set is another one.
    """
    place = Path(record_dir) / FOLDER
    path = place / SCORES
    if not path.is_file():
        raise DataError(
            f"{record_dir} holds no predictions: {path} is missing. Give the folder of a claims run."
        )
    stored = json.loads(path.read_text())
    found: list[Rescored] = []
    for file, entry in sorted(stored.items()):
        data = data_of(entry["task"], quick=entry["quick"])
        if data.digest != entry["data"]:
            raise DataError(
                f"{file} answers another version of {entry['task']} (digest {entry['data']}; the shipped one "
                f"is {data.digest}). Score it with the lorasmith that wrote it."
            )
        now = MEASURES[data.task].all(_outputs(place / file, data), data.test)
        scores = entry["scores"]
        names = [*scores, *(name for name in now if name not in scores)]
        found += [Rescored(file, name, scores.get(name), now.get(name)) for name in names]
    return found


def _outputs(path: Path, data: Data) -> list[str]:
    """Answers in the order of the test records, whose prompts must be the same."""
    zipped = path.with_name(path.name + ".gz")
    try:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            text = gzip.decompress(zipped.read_bytes()).decode("utf-8")
        lines: list[dict[str, Any]] = [json.loads(line) for line in text.split("\n") if line]
        prompts, outputs = [line["prompt"] for line in lines], [str(line["output"]) for line in lines]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} (or {zipped.name}) cannot be read as predictions: {error!r}") from error
    if prompts != [row["prompt"] for row in data.test]:
        raise DataError(
            f"{path}: {len(prompts)} predictions, whose prompts are not the {len(data.test)} of "
            f"{data.task}'s test set in their order."
        )
    return outputs
