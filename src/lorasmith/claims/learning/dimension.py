"""How many numbers does a task need? Intrinsic dimension in LoRA's space, and exactly (Fastfood) on a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from lorasmith.analysis import Dimension, intrinsic_dimension
from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.learning.bytes import ByteModel, fit, in_dimensions, loss_on, windows_of
from lorasmith.claims.learning.measuring import encoded
from lorasmith.claims.learning.pictures import GREEN
from lorasmith.claims.learning.sizes import FULL, QUICK, held_out_records, sizes, training_records
from lorasmith.claims.learning.spread import all_of
from lorasmith.drawing import BLUE, ORANGE, label, panels
from lorasmith.lora import LoRAConfig
from lorasmith.train import Bench, measure_dimension

LOW = 0.10
"""Share of the trainable numbers below which a task's dimension is low."""
TINY_DIMENSIONS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TINY_RATES = (0.03, 0.3)
SPACES = {
    "lora": "LoRA of the base, r=16 on all linear layers",
    "scratch": "byte model from a random start, every weight",
    "pretrained": "the same, pre-trained on the prompts",
}


def measure(setting: Setting) -> Measured:
    """d90 in the three spaces."""
    s = sizes(setting)
    key = {
        "dimensions": list(s.dimensions),
        "projections": s.projections,
        "steps": s.steps,
        "held_out": s.held_out,
    }
    lora = setting.cached({"what": "d90 of LoRA", **key}, lambda: in_lora(setting))
    tiny = setting.cached(
        {"what": "d90 of a byte model", "steps": s.byte_steps, "projections": s.projections},
        lambda: in_bytes(s.byte_steps, s.projections),
    )
    return judge({"lora": lora, **tiny})


def in_lora(setting: Setting) -> dict[str, Any]:
    """d90 of the E2E sample in the space of the factors."""
    s, base = sizes(setting), setting.load()
    config = LoRAConfig(rank=16)
    setting.say("intrinsic dimension: short runs through few numbers")
    with Bench(base, config, encoded(base, training_records(s.pairs))) as bench:
        found = measure_dimension(
            bench, rate=s.rates[-1], seeds=s.projections, steps=s.steps, dimensions=s.dimensions,
            held_out=encoded(base, held_out_records(s.held_out)), say=setting.say,
        )  # fmt: skip
        total = sum(p.numel() for p in bench.parameters.values())
    return _plain(found, total, s.dimensions)


def in_bytes(steps: int, projections: int) -> dict[str, Any]:
    """d90 of predicting the bytes of E2E's completions, from a random start and from one that knows the prompts."""
    prompts, data = windows_of("e2e/train", "prompt", 60_000), windows_of("e2e/train", "completion", 60_000)
    held_out = windows_of("e2e/validation", "completion", 20_000)
    fresh, known = ByteModel(0), ByteModel(0)
    fit(known, list(known.parameters()), prompts, lr=1e-2, steps=2 * steps, seed=0)
    total = sum(p.numel() for p in fresh.parameters())
    found = {}
    for name, start in (("scratch", fresh), ("pretrained", known)):
        whole = deepcopy(start)
        fit(whole, list(whole.parameters()), data, lr=1e-2, steps=steps, seed=0)

        def run(dimension: int, seed: int, start: ByteModel = start) -> float:
            return in_dimensions(lambda: deepcopy(start), dimension, data, held_out, rates=TINY_RATES, steps=steps, seed=seed)  # fmt: skip

        measured = intrinsic_dimension(
            run, base_loss=loss_on(start, held_out), target_loss=loss_on(whole, held_out),
            dimensions=TINY_DIMENSIONS, seeds=projections,
        )  # fmt: skip
        found[name] = _plain(measured, total, TINY_DIMENSIONS)
    return found


def _plain(found: Dimension, total: int, tried: tuple[int, ...]) -> dict[str, Any]:
    gains = {str(d): list(g) for d, g in found.gains.items()}
    return {"d90": found.d90, "params": total, "gains": gains, "most_tried": max(tried)}


def judge(found: Mapping[str, Mapping[str, Any]]) -> Measured:
    """Holds if d90 is under a tenth of LoRA's numbers, and pre-training lowers that of the byte model.

    How large a share d90 is of the byte model decides nothing: that model has few numbers to spare.
    """
    scratch, known = (found[name]["d90"] for name in ("scratch", "pretrained"))
    if scratch is not None and known is not None:
        lowered = Holds.YES if known < scratch else Holds.NOT_AT_THIS_SCALE if known == scratch else Holds.NO
    else:
        lowered = Holds.YES if known is not None else Holds.NOT_AT_THIS_SCALE
    rows = [
        {"space": SPACES[name], "trainable numbers": x["params"], "d90": _said(x), "share": _share(x)}
        for name, x in found.items()
    ]  # fmt: skip
    said = (
        f"In LoRA's space {_said(found['lora'])} of {found['lora']['params']:,} numbers keep 90 % of the gain of a short run. "
        f"Over every weight of a byte model of {found['scratch']['params']:,}, through Fastfood, {_said(found['scratch'])} from "
        f"a random start and {_said(found['pretrained'])} after pre-training on other text. An upper bound, by powers of two or "
        "four: random directions are not the best ones, and it bounds how many numbers are needed, not a rank."
    )
    return Measured(all_of(_is_low(found["lora"]), lowered), said, dict(found), rows)


def _is_low(found: Mapping[str, Any]) -> Holds:
    if found["d90"] is not None:
        return Holds.YES if found["d90"] < LOW * found["params"] else Holds.NO
    return Holds.NOT_AT_THIS_SCALE if found["most_tried"] < LOW * found["params"] else Holds.NO


def _said(found: Mapping[str, Any]) -> str:
    return f"{found['d90']:,}" if found["d90"] is not None else f"more than {found['most_tried']:,}"


def _share(found: Mapping[str, Any]) -> str:
    return f"{found['d90'] / found['params']:.2%}" if found["d90"] is not None else "–"


def draw(measured: Measured, out: Path) -> None:
    """Share of the gain over the dimension: a dot for each projection."""
    with panels(out) as (panel,):
        for (name, found), colour in zip(measured.figures.items(), (BLUE, ORANGE, GREEN), strict=True):
            gains = {int(d): values for d, values in found["gains"].items()}
            middle = [sorted(v)[len(v) // 2] for v in gains.values()]
            panel.plot(list(gains), middle, color=colour, linewidth=1.8, label=SPACES[name])
            for d, values in gains.items():
                panel.scatter([d] * len(values), values, s=16, color=colour, alpha=0.6, linewidths=0)
        panel.axhline(0.9, color="#6b7685", linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_ylim(top=1.05)
        label(
            panel,
            "share of unrestricted training's gain (dashed: 90 %)",
            "numbers that train",
            "share of the gain",
        )
        panel.legend(frameon=False, fontsize=8, loc="lower right")


CLAIM = Claim(
    id="intrinsic-dimension",
    title="A task needs few numbers",
    claim="Pre-trained models reach 90 % of full performance when only a few hundred or thousand numbers along random "
    "directions train, and pre-training lowers that number. (This is why the paper expects a low rank to do.)",
    source="Aghajanyan et al. 2020, table 1; Li et al. 2018; Hu et al. 2021, §1",
    design="d90 by bisection: the least dimension whose median run keeps 90 % of the gain. In LoRA's space: increments of A and "
    f"B are λ ⊙ P θ, P sparse; full: d in {FULL.dimensions}, {FULL.projections} projections, {FULL.steps} steps of 8 E2E pairs, two "
    f"rates for θ, on {FULL.held_out} held-out pairs; quick: {QUICK.dimensions}, {QUICK.projections} and {QUICK.steps}. Exactly: Fastfood "
    f"(DID) over every weight of a byte model on E2E's texts, d in {TINY_DIMENSIONS}, {FULL.byte_steps} steps of 512 (quick {QUICK.byte_steps}). It holds if d90 is "
    "under a tenth of the trainable numbers in LoRA's space, and pre-training lowers it in the byte model.",
    expected="d90 of MRPC / QQP by DID: BERT-base 1,861 / 9,295, RoBERTa-large 322 / 774 of 355 million weights.",
    measure=measure,
    draw=draw,
)
