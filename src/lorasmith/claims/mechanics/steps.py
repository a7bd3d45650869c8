"""Time of a training step, LoRA against full fine-tuning by the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.mechanics.start import random_ids
from lorasmith.claims.timing import conditions, interleaved, ratio
from lorasmith.drawing import BLUE, GREY, TEAL, label, panels
from lorasmith.inject import group_shared_inputs, inject
from lorasmith.lora import LoRAConfig
from lorasmith.planning import Computing, Pass, Trained, decoder_of, work_of
from lorasmith.train import Batch, Forward, computing

LORA, FULL, RANK = "LoRA", "full", 16
PAPER = 32.5 / 43.1
"""Tokens per second of full fine-tuning and of LoRA, GPT-3 175B on V100: time per token, LoRA / full."""


def measure(setting: Setting) -> Measured:
    """Steps in turns, and the FLOPs that they take."""
    batch, length, seconds = (4, 128, 25) if setting.quick else (8, 256, 45)
    key = {"claim": "step time", "version": 1, "batch": [batch, length], "rank": RANK, "s": seconds}
    found = setting.cached(key, lambda: _measure(setting, batch, length, seconds))
    times = found["times"]
    r = ratio(times[LORA], times[FULL])
    rows = [
        {"method": m, "median, s": sorted(times[m])[len(times[m]) // 2], "rounds": len(times[m])}
        | {"GFLOP": found["flops"][m] / 1e9, "seconds": times[m]}
        for m in (LORA, FULL)
    ]
    share = found["flops"][LORA] / found["flops"][FULL]
    reaches = r.low <= PAPER and r.high < 1
    verdict = Holds.YES if reaches else Holds.NO if r.low >= 1 > share else Holds.NOT_AT_THIS_SCALE
    said = (
        f"A LoRA step takes {r} of a full one, {abs(1 - r.median):.0%} {'less' if r.median < 1 else 'more'} time; by FLOPs it would be {share:.2f}. The paper's “25 % speed-up” is 24.6 % less time per token, a ratio of {PAPER:.3f}. "
        f"{len(times[LORA])} rounds of {batch} × {length} tokens on {found['threads']} threads."
    )
    return Measured(
        verdict, said, {"ratio": r.median, "low": r.low, "high": r.high, "flops_ratio": share}, rows
    )


def _measure(setting: Setting, batch: int, length: int, seconds: float) -> dict[str, Any]:
    with ExitStack() as stack:
        steps = {name: stack.enter_context(_step(setting, name, batch, length)) for name in (LORA, FULL)}

        def arm(name: str) -> Any:
            return lambda: nullcontext(steps[name][0])

        for step, _ in steps.values():
            step()  # allocates Adam's state
        times = interleaved({name: arm(name) for name in steps}, seconds=seconds, least=8)
    return {"times": times, "flops": {name: flops for name, (_, flops) in steps.items()}, **conditions()}


@contextmanager
def _step(setting: Setting, name: str, batch: int, length: int) -> Iterator[tuple[Callable[[], None], int]]:
    """One optimizer step as the training loop makes it, and its FLOPs."""
    model = setting.load().model
    decoder = decoder_of(model)
    if name == LORA:
        inject(model, LoRAConfig(rank=RANK, alpha=2 * RANK), seed=0)
    else:
        model.requires_grad_(True)
    forward = Forward(model)
    if name == LORA:
        group_shared_inputs(model, forward.probe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)
    ids = random_ids(model, batch, length + 1)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1).contiguous()
    data = Batch(inputs, None, None, torch.arange(len(targets)), targets)

    def step() -> None:
        (forward.loss_sum(data) / len(data.targets)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    trained = Trained(dict.fromkeys(decoder.linears, RANK) if name == LORA else None)
    work = work_of(decoder, trained, Pass(batch, length, len(targets)), Computing())
    with computing(model, kernels="auto", recompute="none", flops=0, warm_up=step):
        yield step, work.flops


def draw(found: Measured, path: Path) -> None:
    """Every round's pair of steps, and the ratio beside the paper's and the FLOPs'."""
    f = found.figures
    with panels(path, 2, width=4.5, height=2.8) as (left, right):
        for row, colour in zip(found.rows, (TEAL, BLUE), strict=True):
            left.plot(
                range(1, row["rounds"] + 1),
                row["seconds"],
                "o-",
                markersize=3,
                color=colour,
                label=row["method"],
            )
        left.set_ylim(bottom=0)
        left.legend(frameon=False, fontsize=8)
        label(left, "seconds of a step, in turns", "round")
        marks = {"measured": f["ratio"], "paper, GPT-3": PAPER, "FLOPs": f["flops_ratio"]}
        names = list(marks)
        right.errorbar([f["ratio"]], [0], xerr=[[f["ratio"] - f["low"]], [f["high"] - f["ratio"]]], fmt="o", color=TEAL, capsize=4)  # fmt: skip
        right.plot(list(marks.values())[1:], [1, 2], "D", color=BLUE)
        right.set_yticks(range(3), names)
        right.axvline(1, color=GREY, linewidth=1)
        right.set_xlim(0.5, max(1.05, f["high"] * 1.02))
        right.set_ylim(-0.6, 2.6)
        label(right, "time of a LoRA step, full = 1")


STEP_TIME = Claim(
    id="step-time",
    title="A training step takes a quarter less time",
    claim="Training GPT-3 175B is 25 % faster than full fine-tuning, as most weights need no gradient (43.1 against 32.5 tokens/s per V100).",
    source="Hu et al. 2021, §4.2",
    design=f"Optimizer steps on 8 × 256 random tokens (quick: 4 × 128), all supervised, rank {RANK} on all linear layers against full fine-tuning by the same loop, in turns in one process, at least 8 rounds; "
    "ratios round by round, their median with a 95 % bootstrap interval. FLOPs: forward 2, input gradients 2, weight gradients 2 per weight and token, so ⅔ without the last. "
    f"Holds if the interval reaches {PAPER:.3f} or below and lies under 1; not at this scale if it is faster, but less so, or so narrow that LoRA takes more FLOPs; does not if not faster.",
    expected=f"ratio {PAPER:.3f} (24.6 % less time per token, which is 32.6 % more tokens per second); FLOPs ⅔",
    measure=measure,
    draw=draw,
)
