"""The tasks: which of the shipped records are used, and how much is trained on them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from lorasmith.claims.quality.arms import Data, Rows
from lorasmith.data import sample_path

TASKS = ("e2e", "clinc150", "wikisql")
SIZES: Mapping[str, Mapping[str, int]] = {
    "e2e": {"train": 320, "validation": 32, "test": 64, "steps": 40, "search_steps": 12, "max_tokens": 80},
    "clinc150": {"train": 320, "validation": 64, "test": 400, "steps": 80, "search_steps": 24, "max_tokens": 16},
    "wikisql": {"train": 320, "validation": 32, "test": 100, "steps": 40, "search_steps": 12, "max_tokens": 80},
}  # fmt: skip
QUICK = {"train": 96, "validation": 8, "test": 24, "steps": 12, "search_steps": 0}


def data_of(task: str, *, quick: bool = False) -> Data:
    """Records of one task, always the same ones."""
    size = {**SIZES[task], **(QUICK if quick else {})}
    return Data(
        task,
        train=_drawn(task, "train", size["train"]),
        validation=_drawn(task, "validation", size["validation"]),
        test=_drawn(task, "test", size["test"]),
        steps=size["steps"],
        search_steps=size["search_steps"],
        max_tokens=size["max_tokens"],
    )


def _drawn(task: str, part: str, number: int) -> Rows:
    lines = sample_path(f"{task}/{part}").read_text(encoding="utf-8").split("\n")
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line]
    if number >= len(rows):
        return rows
    return random.Random(f"{task} {part}").sample(rows, number)
