"""One epoch of a data set by lorasmith, in a process of its own: prints one JSON object.

python -m train.epoch DATA
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import lorasmith as ls


def main() -> None:
    base = ls.load_base("smollm2-135m")
    settings = ls.TrainConfig(lr=1e-3, batch_size=8, shuffle=False, save_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        result = ls.train(base, sys.argv[1], ls.LoRAConfig(rank=16, alpha=32), settings, out=out, quiet=True)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    print(
        json.dumps(
            {
                "train_s": sum(row.get("step_s", 0.0) for row in rows),
                "tokens": result.tokens,
                "peak_rss_bytes": result.peak_rss_bytes,
                "losses": losses,
            }
        )
    )


if __name__ == "__main__":
    main()
