"""A sweep's folder: `sweep.json`, and a folder for each run with what `train` leaves there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.errors import OutputError, TrainingError
from lorasmith.sweep.member import OUTCOME
from lorasmith.train import commit, versions, write_atomically

FILE = "sweep.json"


def prepare(folder: Path, plan: dict[str, Any], *, resume: bool) -> None:
    """Make the folders; refuse to write over another sweep, or to go on with one that differs.

    Raises:
        OutputError: `folder` holds a sweep and `resume` is not asked, or it cannot be written.
        TrainingError: the sweep there is another one; says in what.
    """
    before = _read(folder / FILE)
    if before is not None and not resume:
        raise OutputError(
            f"{folder} holds a sweep already. Choose another folder, or go on with it through --resume (resume=True)."
        )
    if before is not None:
        _check_same(folder, before, json.loads(json.dumps(plan)))
    try:
        for name in plan["runs"]:
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another folder."
        ) from error


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Say what is being swept, keeping results that are there."""
    write_result(folder, plan, (_read(folder / FILE) or {}).get("result"))


def write_result(folder: Path, plan: dict[str, Any], result: Any) -> None:
    """Plan, ranking and versions in one file."""
    record = {"plan": plan, "result": result, "versions": versions(), "commit": commit()}
    write_atomically(folder / FILE, json.dumps(record, indent=2) + "\n")


def finished(folder: Path) -> dict[str, Any] | None:
    """Outcome of a run that has ended."""
    return _read(folder / OUTCOME)


def latest_round(folders: Sequence[Path]) -> int:
    """The newest round that every one of these runs has a checkpoint of; 0 where there is none."""
    rounds = [
        {int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*")}
        for folder in folders
    ]
    return max(set.intersection(*rounds), default=0)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}); choose another folder.") from error
    return found


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    then = before.get("plan", {})
    lines = [
        f"{key}: {then.get(key)!r} then, {now[key]!r} now"
        for key in now
        if key != "runs" and then.get(key) != now[key]
    ]
    old, new = then.get("runs", {}), now["runs"]
    lines += [f"{name}: only {'now' if name in new else 'then'}" for name in sorted({*old} ^ {*new})]
    for name in sorted({*old} & {*new}):
        lines += [
            f"{name}: {key} {old[name].get(key)!r} then, {value!r} now"
            for key, value in new[name].items()
            if old[name].get(key) != value
        ]
    if lines:
        raise TrainingError(
            f"{folder} holds another sweep; going on would mix the two:\n  " + "\n  ".join(lines)
            + "\n  Resume with the same grid and settings, or choose another output folder."
        )  # fmt: skip
