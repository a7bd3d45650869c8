"""What an adapter adds to a forward pass: nothing when merged; apart, or with layers of its own, something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasmith.baselines import make_method
from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.mechanics.adapters import QV, random_adapter
from lorasmith.claims.mechanics.start import random_ids
from lorasmith.claims.timing import Arm, Ratio, conditions, interleaved, ratio
from lorasmith.drawing import COLOURS, GREY, label, panels
from lorasmith.inject import eject, inject, merged
from lorasmith.lora import LoRAConfig

BASE, AGAIN, MERGED = "base", "base again", "merged"
APART_QV, APART_ALL = "apart: q and v, rank 8", "apart: all linear, rank 16"
HOULSBY, LIN = "Houlsby", "Lin"
DECODE, DECODE_CONTEXT = "decode", 128
QUICK_CELLS = ("1 × 16", "1 × 128", "8 × 64", DECODE)
FULL_CELLS = ("1 × 16", "1 × 128", "1 × 512", "8 × 16", DECODE, "8 × 128")
WIDEST = 0.10
QUICK_S, FULL_S = 8, 45
LEAST = 5
CONFIGS = {APART_QV: LoRAConfig(rank=8, alpha=16, targets=QV), APART_ALL: LoRAConfig(rank=16, alpha=32)}
Times = Mapping[str, list[float]]


def grid(setting: Setting) -> dict[str, Times]:
    """Cell → arm → seconds of each round, of what is computed beside the base; two claims read it."""
    return _grid(setting, {"claim": "latency", "version": 2}, _arms_beside)


def merged_grid(setting: Setting) -> dict[str, Times]:
    """The same of the merged model; the base is put in place by the very pass that merges, with B = 0.

    Without that pass before it, the base is up to a percent quicker than the base after it.
    """
    return _grid(setting, {"claim": "latency, merged", "version": 1}, _arms_merged)


def _grid(
    setting: Setting, key: dict[str, Any], arms_of: Callable[[nn.Module], dict[str, Any]]
) -> dict[str, Times]:
    seconds = QUICK_S if setting.quick else FULL_S
    found: dict[str, Times] = {}
    made: list[tuple[nn.Module, dict[str, Arm]]] = []
    for cell in QUICK_CELLS if setting.quick else FULL_CELLS:

        def measure(cell: str = cell) -> dict[str, Any]:
            setting.say(f"    timing {cell}")
            if not made:
                model = _in_own_memory(setting.load().model)
                made.append((model, arms_of(model)))
            model, arms = made[0]
            with torch.no_grad():
                run = _pass(model, cell)
                ready = {name: partial(_ready, arm, run) for name, arm in arms.items()}
                times = interleaved(ready, seconds=seconds, least=LEAST)
            return {"times": times, **conditions()}

        found[cell] = setting.cached(key | {"cell": cell, "s": seconds}, measure)["times"]
    return found


def _in_own_memory(model: Any) -> Any:
    """Weights that were pages of the base's file become copies, as they would at the first merge in place.

    Else the base would be read from the file's pages and the merged model from scattered ones, which is up to a
    quarter slower at few tokens and has nothing to do with LoRA.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@contextmanager
def _ready(arm: Any, run: Any) -> Iterator[Any]:
    with arm():
        yield run


def _pass(model: Any, cell: str) -> Any:
    """One forward pass as inference needs it: logits of the last position alone."""
    if cell == DECODE:
        cache = model(input_ids=random_ids(model, 1, DECODE_CONTEXT), use_cache=True).past_key_values
        token = random_ids(model, 1, 1)

        def step() -> None:
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-1)

        return step
    batch, length = map(int, cell.split(" × "))
    ids = random_ids(model, batch, length)
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)


def _arms_merged(model: nn.Module) -> dict[str, Any]:
    """Each arm writes every weight that an adapter changes, in place, so that all compute from the same memory."""
    adapter, nothing = (random_adapter(model, CONFIGS[APART_ALL]) for _ in range(2))
    for factors in nothing.factors.values():
        factors.B.zero_()
    base, ours = (partial(merged, model, a, keep="cpu") for a in (nothing, adapter))
    return {BASE: base, AGAIN: base, MERGED: ours}


def _arms_beside(model: nn.Module) -> dict[str, Any]:
    """Each arm changes the one model in place, so that all compute from the same memory."""
    adapters = {name: random_adapter(model, config) for name, config in CONFIGS.items()}
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    wanted = adapters[APART_QV].num_params
    sizes = {
        name: max(1, round((wanted / (layers * places) - width) / (2 * width + 1)))
        for name, places in ((HOULSBY, 2), (LIN, 1))
    }

    @contextmanager
    def plain() -> Iterator[None]:
        yield

    @contextmanager
    def apart(name: str) -> Iterator[None]:
        inject(model, adapters[name])
        yield
        eject(model)

    @contextmanager
    def bottleneck(name: str) -> Iterator[None]:
        method = make_method(name.lower(), {"bottleneck": sizes[name]})
        method.attach(model, seed=0)
        model.requires_grad_(False)
        yield
        method.detach(model)

    return {
        BASE: plain,
        APART_QV: partial(apart, APART_QV),
        APART_ALL: partial(apart, APART_ALL),
        HOULSBY: partial(bottleneck, HOULSBY),
        LIN: partial(bottleneck, LIN),
    }


def structure(model: nn.Module) -> dict[str, str]:
    """Every module's class and every tensor's shape and dtype, by name."""
    modules = {name: type(m).__qualname__ for name, m in model.named_modules()}
    return modules | {f"{n} ": f"{tuple(t.shape)} {t.dtype}" for n, t in model.state_dict().items()}


def rows_of(
    found: Mapping[str, Times], arms: tuple[str, ...], *, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """One row for each cell and arm: milliseconds and the ratio to the base."""
    rows = []
    for cell, times in found.items():
        for arm in arms:
            r = ratio(times[arm], times[BASE], confidence=confidence)
            middle = sorted(times[arm])[len(times[arm]) // 2] * 1e3
            rows.append(
                {"cell": cell, "arm": arm, "ms": middle, "ratio": r.median, "low": r.low, "high": r.high}
                | {"rounds": len(times[arm])}
            )
    return rows


def measure_merged(setting: Setting) -> Measured:
    """Structure compared exactly, time with intervals that hold together for all cells."""
    same = setting.cached({"claim": "merged structure", "version": 1}, lambda: _same_structure(setting))
    found = merged_grid(setting)
    rows = rows_of(found, (AGAIN, MERGED), confidence=1 - 0.05 / len(found))
    ours = [row for row in rows if row["arm"] == MERGED]
    control = max(row["high"] - row["low"] for row in rows if row["arm"] == AGAIN)
    slower = [row["cell"] for row in ours if row["low"] > 1]
    wide = [row["cell"] for row in ours if row["high"] - row["low"] > WIDEST]
    if same["different"] or (slower and not wide):
        verdict = Holds.NO
    else:
        verdict = Holds.NOT_AT_THIS_SCALE if wide else Holds.YES
    worst = max(ours, key=lambda row: row["ratio"])
    said = (
        f"Merged, the model has the base's {same['modules']} modules and {same['tensors']} tensors: {same['different']} differ in class, "
        f"shape or dtype. Time against the base is {min(r['ratio'] for r in ours):.3f} to {worst['ratio']:.3f} over {len(ours)} shapes; "
        + (
            f"the interval lies above 1 at {', '.join(slower)}"
            if slower
            else "every interval reaches 1 or below"
        )
        + f" (widest {max(r['high'] - r['low'] for r in ours):.3f}; the base against itself: {control:.3f}). "
        "It is merging that makes it free, not computing beside W: the next claim."
    )
    return Measured(verdict, said, {"structure": same["different"]}, rows)


def _same_structure(setting: Setting) -> dict[str, int]:
    model = setting.load().model
    adapter = random_adapter(model, CONFIGS[APART_ALL])
    before = structure(model)
    with merged(model, adapter):
        during = structure(model)
    different = sum(before.get(n) != during.get(n) for n in before.keys() | during.keys())
    tensors = len(model.state_dict())
    return {"modules": len(before) - tensors, "tensors": tensors, "different": different}


def measure_apart(setting: Setting) -> Measured:
    """What two thin products beside each target cost."""
    rows = rows_of(grid(setting), (APART_QV, APART_ALL))
    costs = [row for row in rows if row["low"] > 1]
    unclear = [row for row in rows if row["low"] <= 1 <= row["high"]]
    few = [row["ratio"] for row in rows if row["arm"] == APART_QV]
    many = [row["ratio"] for row in rows if row["arm"] == APART_ALL]
    every = [row for row in costs if row["arm"] == APART_ALL]
    verdict = (
        Holds.YES
        if len(every) == len(many)
        else Holds.NOT_AT_THIS_SCALE
        if len(unclear) + len(costs) == len(rows)
        else Holds.NO
    )
    said = (
        f"Kept apart, q and v at rank 8 take {min(few):.2f} to {max(few):.2f} times the base, all linear layers at rank 16 "
        f"{min(many):.2f} to {max(many):.2f}; the interval lies above 1 in {len(costs)} of {len(rows)} cells. This is the module's own forward "
        "pass; the engine that serves has kernels for it, and its cost is in the benchmarks."
    )
    return Measured(verdict, said, {}, rows)


def measure_bottleneck(setting: Setting) -> Measured:
    """Slow-down of the two bottleneck adapters, smallest against largest batch of tokens."""
    found = grid(setting)
    rows = rows_of(found, (HOULSBY, LIN))
    cells = [cell for cell in found if cell != DECODE]
    small, large = cells[0], cells[-1]
    pairs = {
        arm: tuple(next(r for r in rows if (r["cell"], r["arm"]) == (cell, arm)) for cell in (small, large))
        for arm in (HOULSBY, LIN)
    }
    clear = [s["low"] > 1 and s["low"] > b["high"] for s, b in pairs.values()]
    against = [s["high"] < 1 or s["high"] < b["low"] for s, b in pairs.values()]
    verdict = Holds.YES if all(clear) else Holds.NO if any(against) else Holds.NOT_AT_THIS_SCALE
    parts = [
        f"{arm} takes {Ratio(s['ratio'], s['low'], s['high'])} times the base at {small} and "
        f"{Ratio(b['ratio'], b['low'], b['high'])} at {large}"
        for arm, (s, b) in pairs.items()
    ]
    alone = [f"{r['arm']} {Ratio(r['ratio'], r['low'], r['high'])}" for r in rows if r["cell"] == DECODE]
    return Measured(
        verdict,
        f"{'; '.join(parts)}. One token with a cache of {DECODE_CONTEXT}: {', '.join(alone)}.",
        {},
        rows,
    )


def draw(found: Measured, path: Path) -> None:
    """Ratios to the base with their intervals, cell by cell."""
    arms = list(dict.fromkeys(row["arm"] for row in found.rows))
    cells = list(dict.fromkeys(row["cell"] for row in found.rows))
    with panels(path, width=9, height=3.4) as (panel,):
        panel.axhline(1, color=GREY, linewidth=1, zorder=0)
        for k, arm in enumerate(arms):
            rows = [row for row in found.rows if row["arm"] == arm]
            x = [cells.index(row["cell"]) + 0.16 * (k - (len(arms) - 1) / 2) for row in rows]
            errors = [[r["ratio"] - r["low"] for r in rows], [r["high"] - r["ratio"] for r in rows]]
            panel.errorbar(x, [r["ratio"] for r in rows], errors, fmt="o", color=COLOURS[k], capsize=3, markersize=5, label=arm)  # fmt: skip
        panel.set_xticks(range(len(cells)), [c if c == DECODE else f"{c} tokens" for c in cells])
        label(panel, "time of a forward pass, base = 1", "batch × length")
        panel.legend(frameon=False, fontsize=8, ncols=len(arms))


TURNS = (
    "One model, whose weights are copied out of the base's file first and changed in place, so that every arm computes from the same memory. "
    "Arms take turns, each round in another order: "
)
CELLS = (
    f"Batch × length {', '.join(c for c in FULL_CELLS if c != DECODE)} (quick: {', '.join(QUICK_CELLS[:-1])}), and one token with a cache of "
    f"{DECODE_CONTEXT}; at least {LEAST} rounds, as many as fit {FULL_S} s "
    f"a cell (quick: {QUICK_S} s). Ratios to the base are taken round by round; their median with a 95 % bootstrap interval. "
)
GRID = (
    TURNS
    + "the base, LoRA apart on q and v (rank 8) and on all linear layers (rank 16), Houlsby's and Lin's bottleneck adapters with about the "
    "parameters of q and v at rank 8. " + CELLS
)
MERGED_LATENCY = Claim(
    id="merged-latency",
    title="Merged, LoRA adds no latency",
    claim="BA can be merged into W0 when deployed, so inference has no additional latency by construction. (Often told as “computed in "
    "parallel, hence free”; that is not what the paper says, and it is not so.)",
    source="Hu et al. 2021, §4.1 and Table 1",
    design=TURNS
    + "the base, the base again, and LoRA on all linear layers (rank 16) merged. The base is put in place by the same pass that merges, with B = 0 "
    "(bit for bit the base): what such a pass leaves in the caches is no latency of LoRA. "
    + CELLS
    + "The intervals here are Bonferroni's, so that all hold at once with 95 %. Holds if no module or tensor differs in class, shape or dtype "
    f"and no interval lies wholly above 1; not at this scale if one is wider than {WIDEST}.",
    expected="the same structure; ratio 1.00 (Table 1: one column for fine-tuning and LoRA)",
    measure=measure_merged,
    draw=draw,
)
APART_LATENCY = Claim(
    id="unmerged-latency",
    title="Apart, LoRA does cost time",
    claim="If B·A is not merged, so that a batch may mix tasks, latency is the price.",
    source="Hu et al. 2021, §4.2 (the limitation it names)",
    design=GRID
    + "Holds if the interval of LoRA on all linear layers lies above 1 in every cell; does not if any interval lies wholly below 1.",
    expected="ratio above 1, most where there are few tokens; the paper gives no number",
    measure=measure_apart,
    draw=draw,
)
BOTTLENECK_LATENCY = Claim(
    id="bottleneck-latency",
    title="Bottleneck adapters add latency, most at small batches",
    claim="Adapter layers are computed one after the other, so they slow down inference where the batch is small, however few parameters they have.",
    source="Hu et al. 2021, §3, Table 1 and Figure 5",
    design=GRID
    + "Holds if for both adapters the interval at the fewest tokens lies above 1 and above that at the most tokens; does not if one lies below.",
    expected="GPT-2 medium: batch 1 × 128 +30.3 % (Houlsby), +20.7 % (Lin); 16 × 256 +8.4 %, +5.0 %; 32 × 512 +3.0 %, +2.2 %",
    measure=measure_bottleneck,
    draw=draw,
)
