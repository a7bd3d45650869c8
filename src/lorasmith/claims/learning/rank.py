"""Does a very small rank suffice? (paper, tables 6 and 18)"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.learning.pictures import points_with_spread, size_axis
from lorasmith.claims.learning.runs import Arm, Tuned, tune
from lorasmith.claims.learning.sizes import LONG, QUICK, Sizes, long_sizes
from lorasmith.claims.learning.spread import all_of, below, difference, pooled
from lorasmith.drawing import BLUE, ORANGE, label, panels

QV = ("q_proj", "v_proj")
ENOUGH = 0.05
"""Share of the best rank's gain that the smallest rank may lack and still suffice."""


def rank_arms(s: Sizes, targets: str | tuple[str, ...]) -> dict[int, Arm]:
    """Rank → its run."""
    ranks = s.ranks if targets == "all-linear" else s.qv_ranks
    return {r: Arm("lora", s.pairs, s.steps, s.held_out, rank=r, targets=targets) for r in ranks}


def tuned_ranks(setting: Setting, s: Sizes, targets: str | tuple[str, ...]) -> dict[int, Tuned]:
    """Rank → its runs at its best rate."""
    arms = rank_arms(s, targets)
    found = tune(setting, arms.values(), s.rates, s.seeds)
    return {rank: found[arm] for rank, arm in arms.items()}


def measure(setting: Setting) -> Measured:
    """Losses over the rank for two sets of matrices, and what the smallest rank lacks."""
    s = long_sizes(setting)
    curves = {"q, v": tuned_ranks(setting, s, QV), "all linear": tuned_ranks(setting, s, "all-linear")}
    return judge(curves)


def judge(curves: Mapping[str, Mapping[int, Tuned]]) -> Measured:
    """Holds if in each curve the smallest rank lacks less than a twentieth of the best rank's gain."""
    spread = pooled(t.losses for curve in curves.values() for t in curve.values())
    verdicts: list[Holds] = []
    said: list[str] = []
    for name, curve in curves.items():
        best = min(curve, key=lambda r: curve[r].mean)
        least = min(curve)
        lacks = difference(curve[least].losses, curve[best].losses, spread)
        gain = curve[best].base_loss - curve[best].mean
        verdicts.append(Holds.YES if best == least else below(lacks, ENOUGH * gain))
        said.append(
            f"on {name}, rank {least} is at {curve[least].mean:.3f}, the best rank ({best}) at {curve[best].mean:.3f}: "
            f"a difference of {lacks} nats per token, of a gain of {gain:.3f}"
        )
    rows = [
        {"matrices": name, "rank": rank, "parameters": t.runs[0].params, "learning rate": t.lr,
         "loss": t.mean, "losses": list(t.losses)}
        for name, curve in curves.items() for rank, t in curve.items()
    ]  # fmt: skip
    text = "; ".join(said)
    return Measured(
        all_of(*verdicts),
        f"{text[0].upper()}{text[1:]} (95 % interval, from {spread.freedom} repeats with another seed).",
        {"sd_of_a_run": spread.sd, "base_loss": next(iter(next(iter(curves.values())).values())).base_loss},
        rows,
    )


def draw(measured: Measured, out: Path) -> None:
    """Loss over the rank."""
    with panels(out) as (panel,):
        for name, colour in (("q, v", ORANGE), ("all linear", BLUE)):
            curve = {row["rank"]: row["losses"] for row in measured.rows if row["matrices"] == name}
            points_with_spread(panel, curve, colour, name, sd=measured.figures["sd_of_a_run"])
        size_axis(panel, sorted({row["rank"] for row in measured.rows}))
        label(panel, "held-out loss at each rank's best learning rate", "rank", "nats per token")
        panel.legend(frameon=False, fontsize=9)


def described(s: Sizes) -> str:
    """Sizes of the training runs, in words."""
    rates = ", ".join(f"{r:g}" for r in s.rates)
    return (
        f"{s.pairs} E2E pairs, {s.steps} steps of 8, loss on {s.held_out} held-out pairs; learning rate of each arm the "
        f"best of {rates} there, then {len(s.seeds)} seeds"
    )


CLAIM = Claim(
    id="rank",
    title="A very small rank suffices",
    claim="A rank as low as one adapts a model about as well as a rank of 64 does.",
    source="Hu et al. 2021, §7.2, tables 6 and 18",
    design=f"LoRA on q and v and on all linear layers at several ranks, alpha 32. Full: ranks {LONG.qv_ranks} on q, v "
    f"and {LONG.ranks} on all; {described(LONG)}. Quick: {described(QUICK)}. It holds if in both the smallest "
    "rank lacks less than 5 % of the best rank's gain over the base, with 95 % confidence.",
    expected="GPT-3, WikiSQL accuracy ± 0.5: q, v 73.4 at r=1, 73.5 at r=64; all of attention 74.1 and 73.9. GPT-2 M, E2E "
    "validation loss: 1.23 at r=1, 1.16 from r=16 on.",
    measure=measure,
    draw=draw,
)
