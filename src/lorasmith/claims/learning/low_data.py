"""Which method does best on few examples? (paper, table 16)"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorasmith.claims.claim import Claim, Measured, Setting
from lorasmith.claims.learning.approach import full_arm, tuned_full
from lorasmith.claims.learning.pictures import level, points_with_spread, size_axis
from lorasmith.claims.learning.prefix import tuned_lengths
from lorasmith.claims.learning.rank import described, tuned_ranks
from lorasmith.claims.learning.runs import Arm, Tuned, tune
from lorasmith.claims.learning.sizes import FULL, QUICK, sizes
from lorasmith.claims.learning.spread import all_of, below, difference, pooled
from lorasmith.drawing import BLUE, ORANGE, SOFT, label, panels

RANK, LENGTH = 4, 16
METHODS = ("LoRA", "full", "prefix")


def measure(setting: Setting) -> Measured:
    """Losses of three methods on few and more records, with equal steps."""
    s = sizes(setting)
    rank = RANK if RANK in s.ranks else min(s.ranks)
    found: dict[str, dict[int, Tuned]] = {
        "LoRA": {s.pairs: tuned_ranks(setting, s, "all-linear")[rank]},
        "full": {s.pairs: tuned_full(setting, s)},
        "prefix": {s.pairs: tuned_lengths(setting)[LENGTH]},
    }
    for few in s.few:
        lora = Arm("lora", few, s.steps, s.held_out, rank=rank)
        prefix = Arm("prefix", few, s.steps, s.held_out, virtual_tokens=LENGTH)
        found["LoRA"][few] = tune(setting, [lora], s.rates, s.seeds)[lora]
        found["prefix"][few] = tune(setting, [prefix], s.prefix_rates, s.seeds)[prefix]
        full = full_arm(s, few)  # one seed: it costs most
        found["full"][few] = tune(setting, [full], s.full_rates, s.full_seeds[:1])[full]
    return judge({method: dict(sorted(curve.items())) for method, curve in found.items()})


def judge(found: Mapping[str, Mapping[int, Tuned]]) -> Measured:
    """Holds if on the fewest records LoRA is below full fine-tuning and prefix tuning."""
    spread = pooled(t.losses for curve in found.values() for t in curve.values())
    few = min(found["LoRA"])
    against = {
        other: {n: difference(t.losses, found[other][n].losses, spread) for n, t in found["LoRA"].items()}
        for other in METHODS[1:]
    }
    verdict = all_of(*(below(against[other][few], 0.0) for other in against))
    rows = [
        {"records": n, "method": method, "learning rate": t.lr, "loss": t.mean, "losses": list(t.losses),
         "LoRA less it": str(against[method][n]) if method in against else "–"}
        for method, curve in found.items() for n, t in curve.items()
    ]  # fmt: skip
    most = max(found["LoRA"])
    said = (
        f"On {few} records LoRA is at {found['LoRA'][few].mean:.3f}: {against['full'][few]} against full fine-tuning and "
        f"{against['prefix'][few]} against a prefix; on {most} records {against['full'][most]} and {against['prefix'][most]} "
        f"(nats per token, 95 % interval, {spread.freedom} repeats)."
    )
    return Measured(
        verdict, said, {"sd_of_a_run": spread.sd, "base_loss": found["LoRA"][few].base_loss}, rows
    )


def draw(measured: Measured, out: Path) -> None:
    """Loss over the number of records."""
    with panels(out) as (panel,):
        for method, colour in zip(METHODS, (BLUE, ORANGE, SOFT), strict=True):
            curve = {row["records"]: row["losses"] for row in measured.rows if row["method"] == method}
            points_with_spread(panel, curve, colour, method, sd=measured.figures["sd_of_a_run"])
        level(panel, measured.figures["base_loss"], "before training")
        size_axis(panel, sorted({row["records"] for row in measured.rows}))
        label(panel, "held-out loss after the same number of steps", "training records", "nats per token")
        panel.legend(frameon=False, fontsize=9)


CLAIM = Claim(
    id="low-data",
    title="LoRA does well on few examples",
    claim="On a hundred examples LoRA is better than full fine-tuning and far better than prefix methods; with more data the "
    "methods come together.",
    source="Hu et al. 2021, appendix F.3, table 16",
    design=f"LoRA (all linear, r={RANK}), full fine-tuning (float32) and a prefix of {LENGTH} on growing numbers of E2E pairs, "
    f"equal steps (few records are repeated), each at its own best rate. Full: {FULL.few} and {FULL.pairs} pairs; "
    f"{described(FULL)}; full fine-tuning on few pairs has one seed. Quick: {QUICK.few} and {QUICK.pairs} pairs, r=1; "
    f"{described(QUICK)}. It holds if on the fewest LoRA is below both with 95 % confidence.",
    expected="GPT-3, MNLI-m accuracy on 100 / 1k / 10k / all: full 60.2 / 85.8 / 88.9 / 89.5, prefix layers 48.3 / 82.5 / "
    "85.9 / 89.6, LoRA 63.8 / 85.6 / 89.2 / 91.7.",
    measure=measure,
    draw=draw,
)
