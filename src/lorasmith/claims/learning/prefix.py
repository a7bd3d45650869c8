"""Does more trainable capacity help a prefix as it helps LoRA? (paper, §4 and table 15)"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.learning.pictures import points_with_spread
from lorasmith.claims.learning.rank import described, tuned_ranks
from lorasmith.claims.learning.runs import Arm, Tuned, tune
from lorasmith.claims.learning.sizes import FULL, QUICK, sizes
from lorasmith.claims.learning.spread import Interval, all_of, below, difference, pooled
from lorasmith.drawing import BLUE, ORANGE, label, panels


def tuned_lengths(setting: Setting) -> dict[int, Tuned]:
    """Virtual tokens → prefix tuning at its best rate."""
    s = sizes(setting)
    arms = {n: Arm("prefix", s.pairs, s.steps, s.held_out, virtual_tokens=n) for n in s.lengths}
    found = tune(setting, arms.values(), s.prefix_rates, s.seeds)
    return {length: found[arm] for length, arm in arms.items()}


def measure(setting: Setting) -> Measured:
    """Losses over the length of a prefix and over the rank."""
    ranks = tuned_ranks(setting, sizes(setting), "all-linear")
    return judge(tuned_lengths(setting), ranks)


def judge(lengths: Mapping[int, Tuned], ranks: Mapping[int, Tuned]) -> Measured:
    """Holds if a prefix longer than the best is worse, and no rank higher than the best is.

    A spread of its own for each method: a prefix's loss varies far more from seed to seed.
    """
    falls_back, prefix_best = _worst_after_best(lengths)
    rises, rank_best = _worst_after_best(ranks)
    prefix_turns = below(Interval(-falls_back.mean, falls_back.half), 0.0) if falls_back else Holds.NO
    gain = ranks[rank_best].base_loss - ranks[rank_best].mean
    lora_stays = below(rises, LORA_MAY_RISE * gain) if rises else Holds.YES
    rows = [
        {"method": method, "size": n, "parameters kept": _kept(method, n, t), "learning rate": t.lr, "loss": t.mean, "losses": list(t.losses)}
        for method, curve in (("prefix", lengths), ("LoRA", ranks)) for n, t in curve.items()
    ]  # fmt: skip
    said = (
        f"The best prefix has {prefix_best} virtual tokens ({lengths[prefix_best].mean:.3f}); "
        + (
            f"the worst longer one is {falls_back} nats per token above it"
            if falls_back
            else "none longer was tried"
        )
        + f". LoRA is best at rank {rank_best} ({ranks[rank_best].mean:.3f}); "
        + (f"the worst higher rank is {rises} above it" if rises else "no higher rank was tried")
        + ". A prefix of n also takes n positions of the context, and LoRA none."
    )
    spreads = {
        "prefix": pooled(t.losses for t in lengths.values()).sd,
        "LoRA": pooled(t.losses for t in ranks.values()).sd,
    }
    return Measured(all_of(prefix_turns, lora_stays), said, {"sd_of_a_run": spreads}, rows)


LORA_MAY_RISE = 0.05
"""Share of LoRA's gain by which its loss may rise with the rank and still count as flat."""


def _worst_after_best(curve: Mapping[int, Tuned]) -> tuple[Interval | None, int]:
    """How far the worst of the larger sizes lies above the best one; None if that is the largest."""
    best = min(curve, key=lambda n: curve[n].mean)
    larger = [n for n in curve if n > best]
    if not larger:
        return None, best
    worst = max(larger, key=lambda n: curve[n].mean)
    return difference(curve[worst].losses, curve[best].losses, pooled(t.losses for t in curve.values())), best


def _kept(method: str, size: int, tuned: Tuned) -> str:
    """Of a prefix the network that it was trained through is dropped."""
    return f"{tuned.runs[0].params:,}" if method == "LoRA" else f"keys and values of {size}"


def draw(measured: Measured, out: Path) -> None:
    """Both curves over their size."""
    with panels(out, 2) as every:
        shown = (("prefix", ORANGE, "virtual tokens"), ("LoRA", BLUE, "rank, all linear layers"))
        for panel, (method, colour, x) in zip(every, shown, strict=True):
            curve = {row["size"]: row["losses"] for row in measured.rows if row["method"] == method}
            points_with_spread(panel, curve, colour, method, sd=measured.figures["sd_of_a_run"][method])
            panel.set_xscale("log")
            panel.set_xticks(list(curve), [str(n) for n in curve])
            panel.minorticks_off()
            label(panel, method, x, "held-out loss, nats per token")


CLAIM = Claim(
    id="prefix-length",
    title="A longer prefix is not always better; a higher rank is not worse",
    claim="Prefix tuning is hard to optimise and its quality changes non-monotonically with the number of trainable "
    "parameters; LoRA's rises and then stays.",
    source="Hu et al. 2021, §3 and §5, figure 2, table 15",
    design="Prefix tuning through its network (random start) at growing length against LoRA on all linear layers at growing "
    f"rank. Full: lengths {FULL.lengths}, rates {FULL.prefix_rates}; {described(FULL)}. Quick: lengths {QUICK.lengths}, "
    f"{described(QUICK)}, prefix rate {QUICK.prefix_rates[0]:g}. It holds if some prefix longer than the best is worse "
    "with 95 % confidence, and no higher rank than LoRA's best is worse by 5 % of its gain.",
    expected="GPT-3, WikiSQL: prefix of 32 embeddings 55.9, 64 58.7, 128 60.6, 256 63.1, 512 55.9; LoRA 73.4 to 74.0 from "
    "4.7 M to 604 M parameters.",
    measure=measure,
    draw=draw,
)
