"""One adapter trained by one, two and four processes on one machine: the same result, how fast, in how much memory.

    lorasmith bench torchrun [--quick]

The command as a user gives it, on the built-in base in bf16, through gloo, each process with one thread. Two sets:
rows of 64 tokens that all carry loss (packing has nothing to share, so the work divides evenly), and the shipped E2E
sample (completions carry loss; a beginning that two processes need is computed in both). The peer of each row is this
very package with one process: of one thread, or of two. Step times are medians of the steps after the first.
A third set is a base of 1.07 billion random weights, rows of 64 tokens, for what sharding saves: peak memory alone.
A fourth is full fine-tuning of the built-in base in float32, the same rows, with all that trains in parts.
LORASMITH_BENCH_TORCHRUN=rows, =E2E, =large or =full runs one set alone.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_quantised import write_base
from bench_sweep import data_file
from safetensors.torch import load_file

SETS = {"rows of 64": 64, "E2E": 1024}
LARGE, FULL = "large", "full"
STEPS, QUICK_STEPS = 6, 3
ABOUT: dict[str, Any] = {"base": "smollm2-135m", "batch_size": 8, "rank": 16}


def run(peers: bool = False, quick: bool = False) -> list[dict[str, Any]]:
    wanted = os.environ.get("LORASMITH_BENCH_TORCHRUN", "")
    rows = []
    for name, max_length in SETS.items():
        if wanted not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows += compared(name, Path(folder), max_length, QUICK_STEPS if quick else STEPS)
    if wanted in LARGE and not quick:
        with tempfile.TemporaryDirectory() as folder:
            rows += peaks_of_a_large_base(Path(folder))
    if wanted in FULL and not quick:
        with tempfile.TemporaryDirectory() as folder:
            rows += full_fine_tuning(Path(folder))
    return rows


def full_fine_tuning(folder: Path) -> list[dict[str, Any]]:
    options = {
        "data": data_file(folder, 64),
        "max-length": 64,
        "batch-size": 4,
        "max-steps": STEPS,
        "save-every": 10**6,
        "method": "full",
        "dtype": "fp32",
    }
    whole, parts = (trained(folder, options | {"shard": shard}, 2, 1) for shard in ("none", "all"))
    return [
        row(
            f"{FULL}: largest difference of a weight, in parts / whole; largest weight", *apart(parts, whole)
        ),
        *(
            row(f"{FULL}: peak of a process, {name}, measured / predicted, MB", run["peak"], run["predicted"])
            for name, run in (("whole", whole), ("in parts", parts))
        ),
        row(f"{FULL}: peak of a process, in parts / whole, MB", parts["peak"], whole["peak"]),
        row(f"{FULL}: step, in parts / whole, 2 processes, s", parts["step_s"], whole["step_s"]),
    ]


def peaks_of_a_large_base(folder: Path) -> list[dict[str, Any]]:
    base = folder / "base"
    write_base(base)
    options = {
        "data": data_file(folder, 64),
        "max-length": 64,
        "batch-size": 2,
        "max-steps": QUICK_STEPS,
        "base": base,
    }
    whole, sharded = (trained(folder, options | {"shard": shard}, 2, 1) for shard in ("none", "base"))
    return [
        row(f"{LARGE}: adapter of the sharded run, difference to that of the whole", *apart(sharded, whole)),
        row(
            f"{LARGE}: peak of a process, whole base, measured / predicted, MB",
            whole["peak"],
            whole["predicted"],
        ),
        row(
            f"{LARGE}: peak of a process, sharded, measured / predicted, MB",
            sharded["peak"],
            sharded["predicted"],
        ),
        row(f"{LARGE}: peak of a process, sharded / whole, MB", sharded["peak"], whole["peak"]),
        row(f"{LARGE}: step, sharded base / whole, 2 processes, s", sharded["step_s"], whole["step_s"]),
    ]


def compared(name: str, folder: Path, max_length: int, steps: int) -> list[dict[str, Any]]:
    data = data_file(folder, max_length)
    options = {
        "data": data,
        "max-length": max_length,
        "batch-size": 8,
        "max-steps": steps,
        "save-every": 10**6,
    }
    one, two_threads, two = (trained(folder, options, *how) for how in ((1, 1), (1, 2), (2, 1)))
    rows = [
        row(f"{name}: step, 2 processes / 1, one thread each, s", two["step_s"], one["step_s"]),
        row(f"{name}: step, 2 processes of one thread / 1 of two, s", two["step_s"], two_threads["step_s"]),
        row(
            f"{name}: largest difference of an adapter weight, 2 processes / largest weight", *apart(two, one)
        ),
    ]
    if max_length == SETS["E2E"]:
        four = trained(folder, options, 4, 1)
        rows.append(
            row(
                f"{name}: largest difference of an adapter weight, 4 processes / largest weight",
                *apart(four, one),
            )
        )
        return rows
    sharded = trained(folder, options | {"shard": "base"}, 2, 1)
    return [
        *rows,
        row(f"{name}: step, sharded base / whole, 2 processes, s", sharded["step_s"], two["step_s"]),
        row(f"{name}: adapter of the sharded run, difference to that of the whole", *apart(sharded, two)),
        row(
            f"{name}: peak of a process, whole base, measured / predicted, MB", two["peak"], two["predicted"]
        ),
        row(
            f"{name}: peak of a process, sharded, measured / predicted, MB",
            sharded["peak"],
            sharded["predicted"],
        ),
    ]


def trained(folder: Path, options: dict[str, object], processes: int, threads: int) -> dict[str, Any]:
    """One run by that many processes: its adapter, step time, peak memory and what was predicted of it."""
    out = folder / f"{processes}-{threads}-{options.get('shard', 'none')}"
    given = {"base": ABOUT["base"], "dtype": "bf16"} | options
    flags = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else []
    )
    command = [sys.executable, *launcher, "-m", "lorasmith", "train"]
    done = subprocess.run(
        [*command, *flags, "--out", str(out), "--json"], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    found = json.loads(done.stdout.strip().splitlines()[-1])
    (predicted,) = re.findall(r"predicted peak ([\d.,]+) GiB", done.stderr)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        "step_s": statistics.median([line["step_s"] for line in lines if "step_s" in line][1:]),
        "peak": found["peak_rss_bytes"] / 1e6,
        "predicted": float(predicted) * 2**30 / 1e6,
        "result": load_file(
            out / ("model/model.safetensors" if "method" in options else "adapter/adapter_model.safetensors")
        ),
    }


def apart(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """Largest absolute difference of two results, and the largest weight of the second."""
    pairs = [(ours["result"][key], tensor) for key, tensor in theirs["result"].items()]
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(b.abs().max()) for _, b in pairs)


def row(what: str, ours: float, peer: float) -> dict[str, Any]:
    return {"what": what, "ours": ours, "peer": peer, "ratio": ours / peer if peer else None}
