"""Learning rate × rank on the shipped E2E sample, from one sweep; goes on where it was stopped.

    python benchmarks/e2e_grid.py OUT [--small]

Held-out loss on the sample's validation records (prompts of their own). Full: 2,000 examples once (250 steps of 8), three
seeds. `--small`: 48 steps, two seeds. Writes `records/e2e_grid.jsonl` and `records/e2e_grid.png` once all runs have ended.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import record

from lorasmith.bases import load_base
from lorasmith.sweep import parse_grid, points, sweep

SAMPLE = Path(__file__).parent.parent / "src/lorasmith/samples/e2e"
FULL = ("lr=2.5e-4,5e-4,1e-3,2e-3,4e-3;rank=1,4,16,64;seed=0,1,2", {})
SMALL = ("lr=5e-4,1e-3,2e-3,4e-3;rank=1,4,16;seed=0,1", {"max_steps": 48, "save_every": 8})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    grid, settings = SMALL if asked.small else FULL
    made = points(parse_grid(grid), {"alpha": 32}, settings)
    data, held = SAMPLE / "train.jsonl", SAMPLE / "validation.jsonl"
    result = sweep(load_base("smollm2-135m"), data, made, out=asked.out, eval_data=held, resume=True)
    if result.interrupted or result.plot is None:
        return
    rows = [
        {key: run[key] for key in ("name", "eval_loss", "train_loss", "steps", "status")}
        for run in result.runs
    ]
    about = {"grid": grid, **settings, "best": result.best, "peak_rss_bytes": result.peak_rss_bytes}
    print(record.append("e2e_grid", rows, about))
    shutil.copy(result.plot, record.RECORDS / "e2e_grid.png")


if __name__ == "__main__":
    main()
