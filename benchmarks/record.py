"""One line of a benchmark's records: the rows, and all that one needs to judge them later."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"


def append(name: str, rows: list[dict[str, Any]], about: Mapping[str, Any]) -> Path:
    """Append the rows with device, versions and commit to `records/<name>.jsonl`."""
    import torch

    line = {
        **about,
        "rows": rows,
        "device": f"cpu {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), **_versions("torch", "transformers", "peft")},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant over rounds that run every one once; the first round is left out."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RECORDS.parent).stdout

    head = git("rev-parse", "--short", "HEAD").strip()
    changed = [line for line in git("status", "--porcelain").splitlines() if ".jsonl" not in line]
    return f"{head}, with changes" if head and changed else head or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model\t")
    return ", ".join(
        dict.fromkeys(line.partition(":")[2].strip() for line in lines if line.startswith(wanted))
    )
