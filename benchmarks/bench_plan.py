"""Predicted against measured peak memory (and time), each run in a process of its own.

python benchmarks/bench_plan.py --bases smollm2-135m,DIR --record benchmarks/records/plan.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lorasmith.data import sample_path
from lorasmith.train import commit, versions

CONFIGS = [
    # rank, sequences a step, tokens a pass, length, layers recomputed, method, data
    (16, 8, 2048, 256, False, "lora", "even"),
    (16, 8, 2048, 64, False, "lora", "even"),
    (128, 4, 512, 256, False, "lora", "even"),
    (16, 2, 2048, 1024, True, "lora", "even"),
    (16, 2, 512, 256, False, "full", "even"),
    (16, 8, 2048, 512, False, "lora", "e2e"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bases", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    for base in options.bases.split(","):
        for k, config in enumerate(CONFIGS):
            if options.only in (None, k):
                row = compare(base, config, options.steps)
                print(json.dumps(row), flush=True)
                if options.record:
                    with options.record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


def compare(base: str, config: tuple, steps: int) -> dict:
    rank, batch, tokens, length, recompute, method, data = config
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        even = folder / "even.jsonl"
        rows = (
            {"text": "the" + " the" * (length - 2)} for _ in range(batch * steps)
        )  # one token a word, and EOS
        even.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = folder / "run.toml"
        run.write_text(
            f'base = "{base}"\ndata = "{even if data == "even" else sample_path("e2e/train")}"\n[lora]\nrank = {rank}\n'
            f'[train]\nmethod = "{method}"\nbatch_size = {batch}\nbatch_tokens = {tokens}\nmax_length = {length}\n'
            f"checkpoint_layers = {str(recompute).lower()}\nmax_steps = {steps}\n"
            + ('packing = "none"\n' if data == "even" else "")
        )
        source = even if data == "even" else sample_path("e2e/train")
        plan = lorasmith("plan", "--base", base, "--data", str(source), "--config", str(run))
        done = lorasmith("train", "--config", str(run), "--out", str(folder / "out"))
        seconds = [json.loads(x) for x in (folder / "out/metrics.jsonl").read_text().splitlines()]
    predicted, measured = plan[method]["peak_bytes"], done["peak_rss_bytes"]
    return {
        "what": "plan",
        "base": Path(base).name,
        "config": dict(
            zip(
                ("rank", "batch_size", "batch_tokens", "length", "recompute", "method", "data"),
                config,
                strict=True,
            )
        ),
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "error": predicted / measured - 1,
        "predicted_s": plan[method]["train_s"],
        "measured_s": sum(row["step_s"] for row in seconds if "step_s" in row),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def lorasmith(*arguments: str) -> dict:
    script = "import sys; from lorasmith.cli import main; main()"
    # 1: the plan says that something does not fit, which is an answer too
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--json"], capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
