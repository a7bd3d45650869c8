"""Eight adapters swept in one process, beside eight PEFT runs one after another.

    lorasmith bench sweep [--peers] [--quick]

The grid: learning rates 5e-4 and 1e-3, ranks 4 and 16, seeds 0 and 1, on all linear layers of the built-in base, bf16. Same
tokens, masks, order, steps, schedule, clipping and optimizer on both sides; every run is a process of its own on the
peer's side. Two sets: the shipped E2E sample, batches of 8 (completions carry loss, beginnings are shared), and rows
of 64 tokens, batches of 4, all of which carry loss and share nothing.
There are few steps, so that eight PEFT runs end in minutes; therefore steps and all else (start, load, tokenise, write)
are told apart. Step times are medians of the steps after the first, added up over the eight runs.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "src/lorasmith/samples/e2e"
LRS, RANKS, SEEDS = ("0.0005", "0.001"), (4, 16), (0, 1)
GRID = f"lr={','.join(LRS)};rank={','.join(map(str, RANKS))};seed={','.join(map(str, SEEDS))}"
SETS = {"E2E, batches of 8": (8, 1024), "64-token rows, batches of 4": (4, 64)}
STEPS, QUICK_STEPS = 6, 3
ABOUT: dict[str, Any] = {"base": "smollm2-135m", "grid": GRID}


def run(peers: bool = False, quick: bool = False) -> list[dict[str, Any]]:
    steps = QUICK_STEPS if quick else STEPS
    wanted = os.environ.get("LORASMITH_BENCH_SWEEP", "")
    rows = []
    for name, (batch_size, max_length) in SETS.items():
        if wanted not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = data_file(Path(folder), max_length)
            ours = our_sweep(data, Path(folder) / "ours", batch_size, max_length, steps)
            peer = peft_runs(data, Path(folder), batch_size, max_length, steps) if peers else None
            rows += compared(f"{name}, {steps} steps", ours, peer)
    return rows


def compared(name: str, ours: dict[str, Any], peer: dict[str, Any] | None) -> list[dict[str, Any]]:
    peer = peer or {}
    losses = {"losses": [ours["losses"], peer.get("losses")]}
    return [
        row(f"{name}: eight steps, one of each run, s", ours["step_s"], peer.get("step_s"), **losses),
        row(f"{name}: all of it, s", ours["wall_s"], peer.get("wall_s")),
        row(f"{name}: beside the steps, s", ours["beside_s"], peer.get("beside_s")),
        row(f"{name}: peak memory / sum of eight, MB", ours["peak"] / 1e6, peer["peak"] / 1e6 if peer else None),
    ]  # fmt: skip


def our_sweep(data: Path, out: Path, batch_size: int, max_length: int, steps: int) -> dict[str, Any]:
    """The command as a user gives it; held-out records are few, since the peer evaluates nothing."""
    (held := data.with_name("held.jsonl")).write_text(
        "".join((SAMPLE / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:4])
    )
    options = {
        "base": "smollm2-135m", "data": data, "eval-data": held, "out": out, "grid": GRID, "batch-size": batch_size,
        "max-length": max_length, "max-steps": steps, "eval-every": 10**6, "save-every": 10**6,
    }  # fmt: skip
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-c", "from lorasmith.cli import main; main()", "sweep", "--json", *flags]
    found, wall = timed(command)
    metrics = [(out / r["name"] / "metrics.jsonl").read_text().splitlines() for r in found["runs"]]
    rows = [[x for x in map(json.loads, lines) if "step_s" in x] for lines in metrics]
    rounds = [sum(of_run[step]["step_s"] for of_run in rows) for step in range(steps)]
    return {
        "step_s": statistics.median(rounds[1:]),
        "wall_s": wall,
        "beside_s": wall - sum(rounds),
        "peak": found["peak_rss_bytes"],
        "losses": statistics.fmean(of_run[-1]["loss"] for of_run in rows),
    }


def peft_runs(data: Path, folder: Path, batch_size: int, max_length: int, steps: int) -> dict[str, Any]:
    results, walls = [], []
    for lr, rank, seed in itertools.product(LRS, RANKS, SEEDS):
        arguments = (data, folder / f"peft-{lr}-{rank}-{seed}", lr, rank, seed, batch_size, max_length, steps)
        found, wall = timed([sys.executable, "-m", "sweeps.peft_run", *map(str, arguments)])
        results.append(found)
        walls.append(wall)
    return {
        "step_s": sum(statistics.median(r["step_s"][1:]) for r in results),
        "wall_s": sum(walls),
        "beside_s": sum(walls) - sum(sum(r["step_s"]) for r in results),
        "peak": sum(r["peak_rss_bytes"] for r in results),
        "losses": statistics.fmean(r["losses"][-1] for r in results),
    }


def data_file(folder: Path, max_length: int) -> Path:
    """The shipped sample, or its texts end to end as one stream that is cut into rows of `max_length`."""
    text = (SAMPLE / "train.jsonl").read_text(encoding="utf-8")
    data = folder / "data.jsonl"
    if max_length == 64:
        words = " ".join(json.loads(line)["completion"] for line in text.splitlines()[::7])
        text = "".join(json.dumps({"text": words[i : i + 4000]}) + "\n" for i in range(0, len(words), 4000))
    data.write_text(text, encoding="utf-8")
    return data


def timed(command: list[str]) -> tuple[dict[str, Any], float]:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True)
    wall = time.perf_counter() - start
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found, wall


def row(what: str, ours: float, peer: float | None, **more: Any) -> dict[str, Any]:
    return {"what": what, "ours": ours, "peer": peer, "ratio": None if peer is None else ours / peer, **more}
