"""What a run leaves beside the adapter: metrics.jsonl, run.json and loss.png."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorasmith.drawing import BLUE, ORANGE, label, panels
from lorasmith.errors import OutputError

PACKAGES = ("lorasmith", "torch", "transformers", "safetensors", "numpy")


def prepare_folder(out: Path, resume: bool) -> Path:
    """Make `out`; refuse to write over another run."""
    if (out / "run.json").exists() and not resume:
        raise OutputError(
            f"{out} holds a run already. Choose another folder, or go on with it through --resume (resume=True)."
        )
    make_writable(out)
    return out


def make_writable(out: Path) -> None:
    """Make the folder `out`, and see whether files can be written in it.

    Raises:
        OutputError: they cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror or error}. Choose another folder."
        ) from error


class Metrics:
    """Appends one JSON object a line. On resume, lines after the resumed step are dropped."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resumed_step] if resumed_step else []
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def add(self, **row: Any) -> None:
        """Append a row and flush it."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoMetrics(Metrics):
    """Those of a process that writes no files."""

    def __init__(self) -> None:
        pass

    def add(self, **row: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}.") from error


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def commit() -> str | None:
    """The git commit of the source tree that lorasmith runs from, if it is one."""
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def plot_loss(metrics: Path, out: Path) -> None:
    """Draw training and evaluation loss over the optimizer steps."""
    rows = read_metrics(metrics)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    evals = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    with panels(out, width=7, height=4) as (panel,):
        if train:
            steps, losses = zip(*train, strict=True)
            panel.plot(steps, losses, color="#9db4d6", linewidth=0.8, label="training, each step")
            panel.plot(steps, _smooth(losses), color=BLUE, linewidth=1.8, label="training, smoothed")
        if evals:
            panel.plot(
                *zip(*evals, strict=True), "o-", color=ORANGE, linewidth=1.4, markersize=4, label="evaluation"
            )
        label(panel, "Loss", "optimizer step", "nats per supervised token")
        panel.grid(alpha=0.25)
        if train or evals:
            panel.legend(frameon=False)


def _smooth(values: tuple[float, ...], keep: float = 0.9) -> list[float]:
    """Exponential mean with the start corrected, as Adam does it."""
    mean, out = 0.0, []
    for i, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**i))
    return out
