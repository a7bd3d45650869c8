"""`lorasmith serve --workers 2` beside one process on the same cores: does a second process pay?

    OMP_NUM_THREADS=2 lorasmith bench fleet [--quick]

The load of `bench serve`: 16 clients in a closed loop, 16 adapters of rank 16 in turn, prompts of 64 tokens, 32 greedy
tokens, streamed. Both get the same cores: one process with all threads, two with half of them each. They run in turn,
twice; medians. `peer` is the one process.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # however this file was loaded
from bench_serve import ABOUT as LOAD
from bench_serve import ADAPTERS, Load, drive, ours, row, write_inputs

CLIENTS, REQUESTS, ROUNDS, WORKERS = 16, 48, 2, 2
ABOUT = {**LOAD, "clients": CLIENTS, "requests": REQUESTS, "rounds": ROUNDS, "workers": WORKERS}


def run(*, peers: bool, quick: bool) -> list[dict[str, Any]]:
    """Rows for throughput and the time to the first token."""
    loads: dict[int, list[Load]] = {WORKERS: [], 1: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = write_inputs(folder, ADAPTERS)
        for round_ in range(1 if quick else ROUNDS):
            for workers, found in loads.items():
                with ours(folder, ADAPTERS, options=("--workers", workers)) as (url, models):
                    asyncio.run(drive(url, models, tokenizer, 1, ADAPTERS, seed=0))  # not counted
                    found.append(
                        asyncio.run(drive(url, models, tokenizer, CLIENTS, REQUESTS, seed=round_ + 1))
                    )
                print(f"{workers} workers: {found[-1]}", file=sys.stderr, flush=True)
    mine, theirs = median(loads[WORKERS]), median(loads[1])
    what = f"{CLIENTS} clients, {ADAPTERS} adapters, {WORKERS} workers / one process"
    return [row(f"{what}, {key}", mine, theirs, key) for key in Load.__dataclass_fields__]


def median(loads: list[Load]) -> Load:
    """Of each figure."""
    return Load(
        *(statistics.median(getattr(load, key) for load in loads) for key in Load.__dataclass_fields__)
    )
