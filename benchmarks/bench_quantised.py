"""QLoRA, and little memory: memory, step time and loss on a base in bf16, int8 and NF4; PEFT with bitsandbytes beside it.

python benchmarks/bench_quantised.py steps --base smollm2-135m|DIR [--arms …] [--steps 6] [--rows 8] [--record]
python benchmarks/bench_quantised.py loss [--steps 40] [--record]
python benchmarks/bench_quantised.py offload --base DIR [--steps 3] [--record]
python benchmarks/bench_quantised.py base --out DIR

`steps`: each arm in a process of its own takes optimizer steps on the same random tokens, all supervised.
`loss`: `lorasmith train` on the E2E sample, the same batches for each format.
`offload`: `lorasmith train` on rows of 1,024 tokens with activations, layers or both away. `base` writes a Llama of the
shape of Llama-3.2-1B, but with the built-in base's vocabulary, with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import append

ARMS = ("bf16", "int8", "nf4", "peft-bf16", "peft-nf4")
SLOTS = 256
HELD_OUT = 64
LONG = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["steps", "loss", "offload", "base", "worker"])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.what == "base":
        write_base(options.out)
    elif options.what == "worker":
        print(json.dumps(work(options.base, options.arms[0], options.steps, options.rows)))
    else:
        make = {"steps": steps, "loss": lambda o: loss(o.steps), "offload": offload}[options.what]
        rows = make(options)
        if options.record:
            about = {
                "what": options.what,
                "base": Path(options.base).name,
                "omp_threads": os.environ.get("OMP_NUM_THREADS"),
            }
            append("quantised", rows, about)


def steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory, median step and losses of each arm."""
    rows = []
    for arm in options.arms:
        command = [sys.executable, __file__, "worker", "--base", options.base, "--arms", arm]
        command += ["--steps", str(options.steps), "--rows", str(options.rows)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{arm}: {done.stderr[-3000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def work(base: str, arm: str, count: int, rows: int) -> dict[str, Any]:
    """One arm, in this process."""
    from train import worker

    from lorasmith.planning import resident_bytes

    worker.ROWS = rows
    started = time.perf_counter()
    model = load_peer(base, arm) if arm.startswith("peft") else load_ours(base, arm)
    loaded_s, loaded = time.perf_counter() - started, resident_bytes()
    peak_loading = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peer = arm.startswith("peft")
    made = worker.peft_step(model) if peer else worker.lorasmith_step(model, method="lora", recompute="none")
    with made as step:
        seconds, losses = [], []
        for _ in range(count):
            started = time.perf_counter()
            losses.append(float(step()))
            seconds.append(time.perf_counter() - started)
    return {
        "arm": arm, "tokens": rows * SLOTS, "step_s": statistics.median(seconds[1:]), "losses": losses,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_loading_bytes": peak_loading, "resident_after_loading_bytes": loaded, "load_s": loaded_s,
    }  # fmt: skip


def load_ours(base: str, arm: str) -> Any:
    from lorasmith.bases import load_base

    return load_base(base, dtype="bf16", quantize=None if arm == "bf16" else arm).model


def load_peer(base: str, arm: str) -> Any:
    """As PEFT's users load a base for QLoRA."""
    import torch
    import transformers

    from lorasmith.bases import base_directory

    four = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    more = {"quantization_config": four} if arm == "peft-nf4" else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        base_directory(base), dtype=torch.bfloat16, device_map="cpu", **more
    )


def loss(count: int) -> list[dict[str, Any]]:
    """Training and held-out loss on the E2E sample, each format under the same settings."""
    from lorasmith.data import sample_path

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        held = Path(scratch) / "held.jsonl"
        lines = sample_path("e2e/validation").read_text().splitlines()[:HELD_OUT]
        held.write_text("\n".join(lines) + "\n")
        for arm in ("bf16", "int8", "nf4"):
            out = Path(scratch) / arm
            flags = [
                "--base",
                "smollm2-135m",
                "--data",
                sample_path("e2e/train"),
                "--eval-data",
                held,
                "--out",
                out,
            ]
            flags += ["--max-steps", count, "--batch-size", 8, "--dtype", "bf16", "--eval-every", count]
            done = lorasmith("train", *flags, *([] if arm == "bf16" else ["--quantize", arm]))
            found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            evaluated = [row["eval_loss"] for row in found if "eval_loss" in row]
            rows.append(
                {
                    "arm": arm, "losses": [round(row["loss"], 4) for row in found if "loss" in row],
                    "eval_before": evaluated[0], "eval_after": evaluated[-1],
                    "tokens_per_s": done["tokens_per_s"], "peak_rss_bytes": done["peak_rss_bytes"],
                }
            )  # fmt: skip
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "losses"}), flush=True)
    return rows


def offload(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory, median step and last loss of the same run with less and less in memory."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "even.jsonl"
        row = json.dumps({"text": "the" + " the" * (LONG - 2)}) + "\n"
        data.write_text(row * options.steps)
        for recompute, away in (
            ("none", "none"),
            ("none", "activations"),
            ("none", "weights"),
            ("layers", "all"),
        ):
            out = Path(scratch) / f"{recompute}-{away}"
            flags = [
                "--base",
                options.base,
                "--data",
                data,
                "--out",
                out,
                "--batch-size",
                1,
                "--dtype",
                "bf16",
            ]
            flags += [
                "--max-length",
                LONG,
                "--max-steps",
                options.steps,
                "--recompute",
                recompute,
                "--offload",
                away,
            ]
            done = lorasmith("train", *flags)
            found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            rows.append(
                {
                    "arm": f"recompute {recompute}, offload {away}", "tokens": LONG,
                    "step_s": statistics.median(r["step_s"] for r in found[1:]), "peak_rss_bytes": done["peak_rss_bytes"],
                    "losses": [r["loss"] for r in found],
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def write_base(folder: Path) -> None:
    """Llama-3.2-1B's shape with random weights and the built-in vocabulary."""
    import torch
    import transformers

    from lorasmith.bases import load_tokenizer

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_theta=500000.0, bos_token_id=1, eos_token_id=2, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer("smollm2-135m").save_pretrained(folder)


def lorasmith(*arguments: Any) -> dict[str, Any]:
    """Answer of a command."""
    script = "from lorasmith.cli import main; main()"
    command = [sys.executable, "-c", script, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
