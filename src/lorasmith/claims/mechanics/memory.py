"""Memory of training: full against LoRA, predicted and measured, and the paper's GPT-3 row."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.mechanics.gpt3 import PARAMS, memories
from lorasmith.drawing import COLOURS, label, panels
from lorasmith.planning import Memory

STEPS, RANK, CLOSE, VISIBLE = 3, 16, 0.2, 0.1
METHODS = ("lora", "full")
PAPER = {"lora": 350e9, "full": 1.2e12}
PARTS = ("weights_bytes", "adapter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")


def measure(setting: Setting) -> Measured:
    """Each method trains in a process of its own; its peak is what the kernel counted."""
    rows_, length = (2, 128) if setting.quick else (8, 256)
    key = {"claim": "memory", "version": 1, "rows": rows_, "length": length, "rank": RANK, "steps": STEPS}
    found = setting.cached(key, lambda: _runs(setting, rows_, length))
    plan, peak = found["plan"], found["peak"]
    rows = [
        {"what": "here", "method": m, "predicted peak": plan[m]["peak_bytes"], "measured peak": peak[m]}
        | {"error": plan[m]["peak_bytes"] / peak[m] - 1}
        | {part.removesuffix("_bytes"): plan[m][part] for part in PARTS}
        for m in METHODS
    ]
    gpt3 = dict(zip(METHODS, map(held, memories()), strict=True))
    rows += [
        {
            "what": "GPT-3 175B, q and v, rank 4",
            "method": m,
            "predicted peak": gpt3[m],
            "measured peak": PAPER[m],
        }
        | {"error": gpt3[m] / PAPER[m] - 1}
        for m in METHODS
    ]
    state = {m: sum(plan[m][part] for part in PARTS[:4]) for m in METHODS}
    saved, predicted = (
        1 - state["lora"] / state["full"],
        plan["full"]["peak_bytes"] - plan["lora"]["peak_bytes"],
    )
    difference = peak["full"] - peak["lora"]
    agrees = abs(predicted / difference - 1) <= CLOSE if difference > 0 else False
    row_agrees = (
        abs(gpt3["lora"] / PAPER["lora"] - 1) <= CLOSE and abs(gpt3["full"] / PAPER["full"] - 1) <= CLOSE
    )
    visible = predicted > VISIBLE * peak["full"]
    if not row_agrees or (difference <= 0 and visible):
        verdict = Holds.NO
    else:
        verdict = Holds.YES if saved >= 2 / 3 and agrees and visible else Holds.NOT_AT_THIS_SCALE
    said = (
        f"Weights, gradients and moments: {state['full'] / 1e6:,.0f} MB in full, {state['lora'] / 1e6:,.0f} MB with LoRA ({saved:.0%} less). Measured peaks of whole processes: "
        f"{peak['full'] / 1e6:,.0f} and {peak['lora'] / 1e6:,.0f} MB, {difference / 1e6:,.0f} MB apart where {predicted / 1e6:,.0f} were predicted; activations and the runtime are in both. "
        f"GPT-3 by the same formulas: {gpt3['full'] / 1e12:.2f} TB and {gpt3['lora'] / 1e9:.0f} GB ({gpt3['full'] / PARAMS:.1f} and {gpt3['lora'] / PARAMS:.1f} bytes a parameter). One run each; no interval."
    )
    figures = {"saved": saved, "difference_bytes": difference, "predicted_difference_bytes": predicted}
    return Measured(verdict, said, figures, rows)


def held(memory: Memory) -> int:
    """Weights, adapter, gradients and Adam's moments, in bytes."""
    return memory.weights_bytes + memory.adapter_bytes + memory.gradient_bytes + memory.optimizer_bytes


def _runs(setting: Setting, rows: int, length: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "even.jsonl"
        data.write_text((json.dumps({"text": "the" + " the" * (2 * length)}) + "\n") * (rows * STEPS))
        plans, peaks = {}, {}
        for method in METHODS:
            setting.say(f"    training {STEPS} steps, {method}")
            run = Path(scratch) / f"{method}.toml"
            run.write_text(f'[train]\nmethod = "{method}"\npacking = "none"\n')
            flags = [
                "--config", run, "--base", setting.base, "--data", data, "--batch-size", rows,
                "--batch-tokens", rows * length, "--max-length", length, "--recompute", "none", "--max-steps", STEPS,
                *(("--rank", RANK) if method == "lora" else ()),
            ]  # fmt: skip
            plans[method] = lorasmith("plan", *flags)[method]
            peaks[method] = lorasmith("train", *flags, "--out", Path(scratch) / method)["peak_rss_bytes"]
    kept = (*PARTS, "peak_bytes")
    return {"plan": {m: {k: plan[k] for k in kept} for m, plan in plans.items()}, "peak": peaks}


def lorasmith(*arguments: Any) -> dict[str, Any]:
    """Answer of a command, in a process of its own; 1 says that a plan does not fit, which is an answer too.

    Raises:
        RuntimeError: with what the command said.
    """
    command = [sys.executable, "-c", "from lorasmith.cli import main; main()", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise RuntimeError(
            f"lorasmith {arguments[0]} ended with {done.returncode}: {done.stderr.strip()[-600:]}"
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def draw(found: Measured, path: Path) -> None:
    """Bytes by purpose as stacked bars with the measured peaks, and GPT-3's row beside the paper's."""
    here = [row for row in found.rows if row["what"] == "here"]
    gpt3 = [row for row in found.rows if row["what"] != "here"]
    with panels(path, 2, width=4.5, height=3) as (left, right):
        for k, row in enumerate(here):
            bottom = 0.0
            for j, part in enumerate(PARTS):
                size = row[part.removesuffix("_bytes")] / 1e6
                left.bar(k - 0.2, size, 0.36, bottom=bottom, color=COLOURS[j], label=part.removesuffix("_bytes") if not k else None)  # fmt: skip
                bottom += size
            left.bar(k - 0.2, row["predicted peak"] / 1e6 - bottom, 0.36, bottom=bottom, color="#e3e8ee", label="runtime, heap" if not k else None)  # fmt: skip
            left.bar(
                k + 0.2,
                row["measured peak"] / 1e6,
                0.36,
                color="#5b6570",
                label="measured peak" if not k else None,
            )
        left.set_xticks(range(len(here)), [row["method"] for row in here])
        left.legend(frameon=False, fontsize=7)
        label(left, "peak memory here: predicted, measured", "", "MB")
        for j, (key, name) in enumerate((("predicted peak", "formula"), ("measured peak", "paper"))):
            values = [row[key] / 1e9 for row in gpt3]
            right.bar(
                [k - 0.2 + 0.4 * j for k in range(len(gpt3))], values, 0.36, color=COLOURS[j], label=name
            )
            for k, value in enumerate(values):
                right.text(k - 0.2 + 0.4 * j, value, f"{value:,.0f}", ha="center", va="bottom", fontsize=8)
        right.set_xticks(range(len(gpt3)), [row["method"] for row in gpt3])
        right.legend(frameon=False, fontsize=8)
        label(right, "GPT-3 175B: weights, gradients, moments", "", "GB")


MEMORY = Claim(
    id="memory",
    title="Training takes a third of the memory",
    claim="Without gradients and moments for frozen weights, memory falls by up to two thirds with Adam; GPT-3 175B from 1.2 TB to 350 GB.",
    source="Hu et al. 2021, §4.2",
    design=f"`lorasmith plan` predicts and `lorasmith train` runs {STEPS} steps of 8 × 256 tokens (quick: 2 × 128), nothing recomputed, LoRA of rank {RANK} on all linear layers and full "
    "fine-tuning, each in a process of its own; the peak is the kernel's. GPT-3's row comes from the same formulas, two bytes a number. The paper's “up to 2/3” speaks of what the "
    f"optimizer holds; activations are extra. Holds if weights, gradients and moments shrink by two thirds or more, the measured difference of peaks is within {CLOSE:.0%} of the predicted, and GPT-3's row "
    f"within {CLOSE:.0%} of the paper's; not at this scale if only the row agrees, or the difference is under a tenth of the peak.",
    expected="−67 %; GPT-3 1.2 TB → 350 GB (6.9 and 2.0 bytes a parameter; the paper does not say what it counts)",
    measure=measure,
    draw=draw,
)
