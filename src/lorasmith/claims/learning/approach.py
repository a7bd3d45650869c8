"""Does LoRA come near full fine-tuning as its rank grows? Trained, and as the full update cut to a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorasmith.analysis import extract_from_full, open_tensors, truncation_curve
from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.learning.measuring import encoded, held_out_loss
from lorasmith.claims.learning.pictures import level, points_with_spread, size_axis
from lorasmith.claims.learning.rank import described, tuned_ranks
from lorasmith.claims.learning.runs import Arm, Tuned, base_for, tune
from lorasmith.claims.learning.sizes import LONG, QUICK, Sizes, held_out_records, long_sizes
from lorasmith.claims.learning.spread import all_of, below, difference, pooled
from lorasmith.drawing import BLUE, ORANGE, label, panels
from lorasmith.formats import read_adapter
from lorasmith.lora import Adapter, LoRAConfig

NEAR = 0.10
"""Share of full fine-tuning's gain that the largest rank may lack and still have come near."""
RISE = 0.02
"""Share of the gain by which noise may raise the truncated update's loss from one rank to the next."""
CUTS = (1, 4, 16, 64, 256)


def full_arm(s: Sizes, pairs: int | None = None) -> Arm:
    """Full fine-tuning of as many steps as LoRA's runs."""
    return Arm("full", pairs or s.pairs, s.steps, s.held_out)


def tuned_full(setting: Setting, s: Sizes) -> Tuned:
    """Full fine-tuning at its best rate."""
    return tune(setting, [full_arm(s)], s.full_rates, s.full_seeds)[full_arm(s)]


def measure(setting: Setting) -> Measured:
    """Trained losses over the rank, and two updates cut to every rank."""
    s = long_sizes(setting)
    ranks, full = tuned_ranks(setting, s, "all-linear"), tuned_full(setting, s)
    of_full = {int(r): x for r, x in _cut_full(setting, full).items()}
    of_lora = {int(r): x for r, x in _cut_lora(setting, ranks[max(ranks)]).items()}
    return judge(ranks, full, of_full, of_lora)


def judge(
    ranks: Mapping[int, Tuned], full: Tuned, of_full: Mapping[int, float], of_lora: Mapping[int, float]
) -> Measured:
    """Holds if the largest rank is near full fine-tuning and nearer than the least, and the full update's loss falls."""
    top, least = max(ranks), min(ranks)
    spread = pooled(t.losses for t in (*ranks.values(), full))
    gain = full.base_loss - full.mean
    gaps = {r: difference(t.losses, full.losses, spread) for r, t in ranks.items()}
    falls = monotone(of_full, gain)
    narrows = below(difference(ranks[top].losses, ranks[least].losses, spread), 0.0)
    grows = Holds.YES if narrows is Holds.YES else Holds.NOT_AT_THIS_SCALE  # a rank of 1 is near already
    verdict = all_of(below(gaps[top], NEAR * gain), Holds.YES if falls else Holds.NO, grows)
    kept = (full.base_loss - of_full[min(of_full)]) / gain
    rows: list[dict[str, Any]] = [
        {"what": f"LoRA r={r}", "learning rate": t.lr, "loss": t.mean, "losses": list(t.losses), "above full": str(gaps[r])}
        for r, t in ranks.items()
    ]  # fmt: skip
    rows.append({"what": "full fine-tuning", "learning rate": full.lr, "loss": full.mean, "losses": list(full.losses), "above full": "–"})  # fmt: skip
    said = (
        f"Above full fine-tuning ({full.mean:.3f}, from {full.base_loss:.3f}): rank {least} {gaps[least]}, rank {top} "
        f"{gaps[top]} nats per token. Full fine-tuning's own update cut to rank {min(of_full)} keeps {kept:.0%} of its "
        f"gain, and its loss {'falls' if falls else 'does not fall'} with the rank."
        + (
            ""
            if narrows is Holds.YES
            else f" Trained, rank {top} is not nearer than rank {least}, so the approach itself can't be seen here."
        )
    )
    return Measured(verdict, said, {
        "sd_of_a_run": spread.sd, "base_loss": full.base_loss, "full_loss": full.mean,
        "full_update_cut": dict(of_full), "lora_update_cut": dict(of_lora),
    }, rows)  # fmt: skip


def monotone(curve: Mapping[int, float], gain: float) -> bool:
    """Whether the loss falls from the first rank to the last, and rises by more than noise nowhere between."""
    losses = [curve[r] for r in sorted(curve)]
    steps = [b - a for a, b in pairwise(losses)]
    return losses[-1] <= losses[0] and all(step <= RISE * gain for step in steps)


def leading(adapter: Adapter, rank: int) -> Adapter:
    """The first `rank` directions of factors that are ordered by singular value, as `extract_from_full` makes them."""
    factors = {p: replace(f, A=f.A[:rank], B=f.B[:, :rank]) for p, f in adapter.factors.items()}
    return Adapter(LoRAConfig(rank=rank, alpha=rank, targets=tuple(factors)), factors)


def _cut_full(setting: Setting, full: Tuned) -> dict[str, float]:
    """Rank → loss of full fine-tuning's change of the linear layers, cut to it (Eckart–Young)."""
    cuts = CUTS[:3] if setting.quick else CUTS

    def compute() -> dict[int, float]:
        setting.say("cutting full fine-tuning's update to growing ranks")
        base = base_for(setting, "full")
        examples = encoded(base, held_out_records(long_sizes(setting).held_out))
        tuned = open_tensors(full.runs[0].folder / "model")
        update = extract_from_full(base.model.state_dict(), tuned, rank=max(cuts), exact_limit=0).adapter
        return {rank: held_out_loss(base, examples, leading(update, rank)) for rank in cuts}

    return _cached(setting, "full update cut", full, cuts, compute)


def _cut_lora(setting: Setting, tuned: Tuned) -> dict[str, float]:
    """Rank → loss of the trained adapter cut to it."""

    def compute() -> dict[int, float]:
        setting.say("cutting the trained adapter to growing ranks")
        base = setting.load()
        examples = encoded(base, held_out_records(long_sizes(setting).held_out))
        return dict(
            truncation_curve(
                read_adapter(tuned.runs[0].folder / "adapter"), lambda a: held_out_loss(base, examples, a),
                base_loss=tuned.base_loss, ranks=CUTS,
            ).losses
        )  # fmt: skip

    return _cached(setting, "lora update cut", tuned, CUTS, compute)


def _cached(
    setting: Setting, what: str, tuned: Tuned, cuts: Sequence[int], compute: Callable[[], Any]
) -> dict[str, float]:
    key = {"what": what, "run": tuned.runs[0].folder.name, "ranks": list(cuts)}
    found: dict[str, float] = setting.cached(key, compute)
    return found


def draw(measured: Measured, out: Path) -> None:
    """Trained at each rank, and one update cut to each rank."""
    found = measured.figures
    with panels(out, 2) as (trained, cut):
        runs = {int(r["what"].partition("=")[2]): r["losses"] for r in measured.rows if "=" in r["what"]}
        points_with_spread(trained, runs, BLUE, "LoRA on all linear layers", sd=found["sd_of_a_run"])
        level(trained, found["full_loss"], "full fine-tuning", colour=ORANGE)
        size_axis(trained, sorted(runs))
        label(trained, "trained at each rank", "rank", "held-out loss, nats per token")
        for key, colour, name in (
            ("full_update_cut", ORANGE, "full fine-tuning's update"), ("lora_update_cut", BLUE, f"LoRA's, trained at rank {max(runs)}"),
        ):  # fmt: skip
            curve = {int(rank): [loss] for rank, loss in found[key].items()}
            points_with_spread(cut, curve, colour, name)
        level(cut, found["full_loss"], "full fine-tuning, uncut", colour=ORANGE)
        size_axis(cut, sorted(map(int, found["full_update_cut"])))
        label(cut, "one update, cut to each rank", "rank kept", "held-out loss, nats per token")
        cut.legend(frameon=False, fontsize=8)


CLAIM = Claim(
    id="approaches-full",
    title="LoRA comes near full fine-tuning as its rank grows",
    claim="With a growing rank LoRA on all matrices converges to full fine-tuning; an update of low rank is enough because "
    "the full update is nearly one.",
    source="Hu et al. 2021, §4.1",
    design="LoRA on all linear layers at growing rank against full fine-tuning (float32), each at its own best learning "
    "rate; then full fine-tuning's own change of the linear layers, and that of LoRA at the largest rank, cut by SVD to "
    f"ranks {', '.join(map(str, CUTS))}. Full: {described(LONG)}, full fine-tuning's rates {LONG.full_rates} and {len(LONG.full_seeds)} seeds. Quick: "
    f"{described(QUICK)}, rate {QUICK.full_rates[0]:g}. It holds if the largest rank lacks less than 10 % of full "
    "fine-tuning's gain and is nearer than the least rank, with 95 % confidence, and the cut update's loss falls with its rank. "
    "Not at this scale if the least rank is as near.",
    expected="GPT-3: LoRA of 37.7 M parameters at or above full fine-tuning on WikiSQL (74.0 / 73.8) and MNLI (91.6 / 89.5).",
    measure=measure,
    draw=draw,
)
