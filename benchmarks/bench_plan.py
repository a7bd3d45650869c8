"""Predicted against measured: peak memory and time of real runs, and of runs under a budget.

python benchmarks/bench_plan.py memory|time|budget [--only N] [--record]

Every run is `lorasmith train` in a process of its own; its peak is what the kernel counted. Two bases:
the built-in one, and one with random weights of another shape (made in a temporary folder).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from record import append

from lorasmith.data import sample_path

STEPS = 4
PACKED_STEPS = 24
"""Passes that differ in shape make memory grow at first."""
BUILT_IN, OTHER = "smollm2-135m", "random-qwen3"


@dataclass(frozen=True)
class Setting:
    """One run; `length` None is the E2E sample, packed, else rows of that many tokens."""

    base: str
    rank: int
    batch_size: int
    batch_tokens: int
    length: int | None
    recompute: str
    method: str = "lora"
    dtype: str = "bf16"


SETTINGS = [
    Setting(BUILT_IN, 16, 8, 2048, 256, "none"),
    Setting(BUILT_IN, 16, 32, 2048, 64, "none"),
    Setting(BUILT_IN, 128, 4, 512, 256, "none"),
    Setting(BUILT_IN, 16, 4, 4096, 1024, "mlp"),
    Setting(BUILT_IN, 16, 4, 4096, 1024, "layers"),
    Setting(BUILT_IN, 16, 32, 2048, None, "none"),
    Setting(BUILT_IN, 16, 4, 1024, 256, "none", dtype="fp32"),
    Setting(BUILT_IN, 16, 2, 512, 256, "none", method="full"),
    Setting(OTHER, 16, 8, 2048, 256, "none"),
    Setting(OTHER, 64, 4, 2048, 512, "mlp"),
    Setting(OTHER, 16, 16, 4096, 256, "layers"),
    Setting(OTHER, 8, 32, 1024, None, "none"),
]
BUDGETS = ("1.2GiB", "1.5GiB", "2GiB")
TIMED = [SETTINGS[0], SETTINGS[5], SETTINGS[8]]
TIMED_STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "time", "budget"])
    parser.add_argument("--only", type=int, nargs="*", help="settings by number, from 0")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for row in {"memory": memory, "time": time, "budget": budget}[options.what](
            Path(scratch), options.only
        ):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if options.record:
        append("plan", rows, {"what": options.what, "omp_threads": os.environ.get("OMP_NUM_THREADS")})


def memory(scratch: Path, only: list[int] | None) -> Iterator[dict[str, Any]]:
    """Predicted against measured peak of each setting."""
    for k, setting in enumerate(SETTINGS):
        if only is None or k in only:
            arguments = flags(setting, scratch, PACKED_STEPS if setting.length is None else STEPS)
            plan = lorasmith("plan", *arguments)[setting.method]
            done = lorasmith("train", *arguments, "--out", scratch / f"out{k}")
            yield {
                **asdict(setting),
                "predicted_bytes": plan["peak_bytes"],
                "measured_bytes": done["peak_rss_bytes"],
                "error": round(plan["peak_bytes"] / done["peak_rss_bytes"] - 1, 4),
                "parts": {name: plan[name] for name in plan if name.endswith("_bytes")},
            }


def time(scratch: Path, only: list[int] | None) -> Iterator[dict[str, Any]]:
    """Predicted against measured seconds of all steps, with and without --measure."""
    for k, setting in enumerate(TIMED):
        if only is None or k in only:
            arguments = flags(setting, scratch, TIMED_STEPS)
            plain, measured = (
                lorasmith("plan", *arguments, *more)["lora"]["train_s"] for more in ((), ("--measure",))
            )
            out = scratch / f"timed{k}"
            lorasmith("train", *arguments, "--out", out)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            real = sum(line["step_s"] for line in lines if "step_s" in line)
            yield {
                **asdict(setting),
                "steps": TIMED_STEPS,
                "measured_s": real,
                "predicted_s": plain,
                "predicted_with_measure_s": measured,
                "error": round(plain / real - 1, 4),
                "error_with_measure": round(measured / real - 1, 4),
            }


def budget(scratch: Path, only: list[int] | None) -> Iterator[dict[str, Any]]:
    """Peak of a run on the E2E sample under each budget."""
    for k, size in enumerate(BUDGETS):
        if only is None or k in only:
            setting = Setting(BUILT_IN, 16, 32, 8192, None, "auto")
            out = scratch / f"budget{k}"
            done = lorasmith(
                "train", *flags(setting, scratch, PACKED_STEPS), "--budget", size, "--out", out, "--seed", k
            )
            chosen = json.loads((out / "run.json").read_text())["train"]
            yield {
                "budget": size,
                "measured_bytes": done["peak_rss_bytes"],
                "share_of_budget": round(done["peak_rss_bytes"] / chosen["budget_bytes"], 4),
                "tokens_per_s": done["tokens_per_s"],
                **{name: chosen[name] for name in ("recompute", "batch_tokens")},
            }


def flags(setting: Setting, scratch: Path, steps: int) -> list[Any]:
    """Of `train` and, but for --out, of `plan`."""
    run = scratch / "run.toml"
    packing = "auto" if setting.length is None else "none"
    run.write_text(f'[train]\nmethod = "{setting.method}"\npacking = "{packing}"\n')
    return [
        "--config", run,
        "--base", other_base(scratch) if setting.base == OTHER else setting.base,
        "--data", sample_path("e2e/train") if setting.length is None else even_rows(scratch, setting, steps),
        *(["--rank", setting.rank] if setting.method == "lora" else []),
        "--batch-size", setting.batch_size,
        "--batch-tokens", setting.batch_tokens,
        "--max-length", setting.length or 1024,
        "--recompute", setting.recompute,
        "--dtype", setting.dtype,
        "--max-steps", steps,
    ]  # fmt: skip


def even_rows(scratch: Path, setting: Setting, steps: int) -> Path:
    """Texts of exactly `length` tokens: one a word, and the end."""
    assert setting.length is not None
    path = scratch / f"even-{setting.length}.jsonl"
    row = json.dumps({"text": "the" + " the" * (setting.length - 2)}) + "\n"
    path.write_text(row * (setting.batch_size * steps))
    return path


def other_base(scratch: Path) -> Path:
    """Qwen 3's shape with random weights: 8 layers of width 1024, untied head, norms of heads."""
    import torch
    import transformers

    from lorasmith.bases import load_tokenizer

    folder = scratch / OTHER
    if not folder.exists():
        config = transformers.Qwen3Config(
            vocab_size=49152, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
            num_attention_heads=16, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
            max_position_embeddings=2048, dtype=torch.bfloat16, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        load_tokenizer(BUILT_IN).save_pretrained(folder)
    return folder


def lorasmith(*arguments: Any) -> dict[str, Any]:
    """Answer of a command; 1 means that a plan does not fit, which is an answer too."""
    script = "from lorasmith.cli import main; main()"
    command = [sys.executable, "-c", script, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
