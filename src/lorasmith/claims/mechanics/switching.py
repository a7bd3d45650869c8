"""Exchanging adapters: here exact, and what subtracting and adding in the weights' dtype leaves behind."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.mechanics.adapters import QV, SHARE, random_adapter
from lorasmith.claims.mechanics.start import checksums
from lorasmith.drawing import COLOURS, GREY, label, panels
from lorasmith.inject import merge, switch, unmerge
from lorasmith.lora import Adapter, LoRAConfig, delta

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SWITCHES, TOLERATED = 100, 0.01


def adapters_of(model: nn.Module) -> list[Adapter]:
    """Four of different ranks and targets."""
    configs = [LoRAConfig(rank=r, alpha=2 * r) for r in (4, 16, 32)] + [
        LoRAConfig(rank=8, alpha=16, targets=QV)
    ]
    return [random_adapter(model, config, seed=k) for k, config in enumerate(configs)]


def measure_switch(setting: Setting) -> Measured:
    """Random switches, then bits against a fresh merge and against the base."""
    times = 20 if setting.quick else SWITCHES
    dtypes = ("fp32", "bf16")
    key = {"claim": "switch", "version": 1, "times": times, "dtypes": list(dtypes)}
    rows = setting.cached(key, lambda: [_switches(setting, dtype, times) for dtype in dtypes])
    wrong = sum(r["tensors unlike a fresh merge"] + r["tensors unlike the base after unmerge"] for r in rows)
    speed = ", ".join(f"{r['switch, s'] * 1e3:.0f} ms ({r['dtype']})" for r in rows)
    said = (
        f"After {times} random switches among four adapters {rows[0]['tensors unlike a fresh merge'] + rows[1]['tensors unlike a fresh merge']} of "
        f"{sum(r['tensors'] for r in rows)} tensors differ from a fresh merge, and after unmerge {sum(r['tensors unlike the base after unmerge'] for r in rows)} from the base. "
        f"A switch takes {speed}, the median; loading the base anew {rows[0]['load the base, s']:.1f} s. Bits are exact, so without an interval."
    )
    quicker = all(r["switch, s"] < r["load the base, s"] for r in rows)
    return Measured(Holds.NO if wrong or not quicker else Holds.YES, said, {}, rows)


def _switches(setting: Setting, dtype: str, times: int) -> dict[str, Any]:
    started = time.perf_counter()
    model = setting.load(dtype).model
    loading = time.perf_counter() - started
    names = set(model.state_dict())
    base = checksums(model, names)
    adapters = adapters_of(model)
    dice, current, seconds = random.Random(0), 0, []
    merge(model, adapters[0])
    for _ in range(times):
        current = dice.choice([k for k in range(len(adapters)) if k != current])
        started = time.perf_counter()
        switch(model, adapters[current])
        seconds.append(time.perf_counter() - started)
    switched = checksums(model, names)
    unmerge(model)
    restored = checksums(model, names)
    merge(model, adapters[current])
    fresh = checksums(model, names)
    return {
        "dtype": dtype,
        "switches": times,
        "tensors": len(base),
        "tensors that a merge changes": sum(fresh[n] != base[n] for n in base),
        "tensors unlike a fresh merge": sum(switched[n] != fresh[n] for n in base),
        "tensors unlike the base after unmerge": sum(restored[n] != base[n] for n in base),
        "switch, s": statistics.median(seconds),
        "slowest, s": max(seconds),
        "load the base, s": loading,
    }


def draw_switch(found: Measured, path: Path) -> None:
    """Seconds of a switch and of loading, by dtype."""
    with panels(path, width=9, height=2.4) as (panel,):
        for k, row in enumerate(found.rows):
            for j, key in enumerate(("switch, s", "load the base, s")):
                panel.barh(
                    2 * k + 0.8 * j, row[key], color=COLOURS[j], height=0.7, label=key[:-3] if not k else None
                )
                panel.text(row[key], 2 * k + 0.8 * j, f" {row[key] * 1e3:,.0f} ms", va="center", fontsize=8)
        panel.set_yticks([2 * k + 0.4 for k in range(len(found.rows))], [r["dtype"] for r in found.rows])
        wrong = sum(r["tensors unlike a fresh merge"] for r in found.rows)
        label(panel, f"exchanging a merged adapter; tensors unlike a fresh merge: {wrong}", "seconds")
        panel.legend(frameon=False, fontsize=8)


def measure_drift(setting: Setting) -> Measured:
    """Drift of W after k exchanges by −ΔW_old, +ΔW_new in the weights' own dtype."""
    layers = 3 if setting.quick else 10
    key = {"claim": "drift", "version": 1, "switches": SWITCHES, "layers": layers, "share": SHARE}
    curves = setting.cached(key, lambda: _drifts(setting, layers))
    rows = [
        {"dtype": name, "drift after 1": c[0], "after 10": c[9], f"after {SWITCHES}": c[-1]} | {"curve": c}
        for name, c in curves.items()
    ]
    last = {name: c[-1] for name, c in curves.items()}
    good = [name for name, value in last.items() if value <= TOLERATED]
    bad = [name for name in last if name not in good]
    said = (
        f"After {SWITCHES} exchanges by subtracting and adding, W differs from a fresh merge by "
        + ", ".join(f"{value:.2g} of ‖ΔW‖ in {name}" for name, value in last.items())
        + f". So it recovers W0 in {' and '.join(good) or 'none of them'}"
        + (f", but not in {' and '.join(bad)}, the dtypes that bases come in" if bad else "")
        + ". lorasmith forms each merge from the pristine W0 instead. Deterministic for these adapters; no interval."
    )
    return Measured(Holds.NO if bad else Holds.YES, said, {"tolerated": TOLERATED}, rows)


def _drifts(setting: Setting, layers: int) -> dict[str, list[float]]:
    model = setting.load("fp32").model
    adapters = [random_adapter(model, LoRAConfig(rank=r, alpha=2 * r), seed=r) for r in (4, 8, 16)]
    depth = int(model.config.num_hidden_layers)
    chosen = {k * depth // layers for k in range(layers)}
    paths = [p for p in adapters[0].factors if _layer(p) in chosen]
    weights = [model.get_parameter(f"{path}.weight").detach() for path in paths]
    deltas = [[delta(adapter.factors[path]) for path in paths] for adapter in adapters]
    return {name: list(_drift(weights, deltas, dtype)) for name, dtype in DTYPES.items()}


def _drift(weights: list[Tensor], deltas: list[list[Tensor]], dtype: torch.dtype) -> Iterator[float]:
    """‖W − fresh‖ / ‖ΔW‖ over all weights, after each exchange."""
    base = [w.to(dtype) for w in weights]
    dice, current = random.Random(0), 0
    live = [w + d.to(dtype) for w, d in zip(base, deltas[0], strict=True)]
    for _ in range(SWITCHES):
        new = dice.choice([k for k in range(len(deltas)) if k != current])
        error = size = 0.0
        for w, w0, old, add in zip(live, base, deltas[current], deltas[new], strict=True):
            w.sub_(old.to(dtype)).add_(add.to(dtype))
            fresh = (w0.float() + add).to(dtype)
            error += float((w.float() - fresh.float()).square().sum())
            size += float(add.square().sum())
        current = new
        yield (error / size) ** 0.5


def _layer(path: str) -> int:
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def draw_drift(found: Measured, path: Path) -> None:
    """Drift against the number of exchanges."""
    with panels(path, width=9, height=3.4) as (panel,):
        for k, row in enumerate(found.rows):
            panel.plot(range(1, len(row["curve"]) + 1), row["curve"], color=COLOURS[k], label=row["dtype"])
        panel.axhline(TOLERATED, color=GREY, linewidth=1)
        panel.text(1, TOLERATED * 1.1, f"{TOLERATED:.0%} of the update", fontsize=8, color="#6b7685")
        panel.set_yscale("log")
        label(panel, "how far W is from a fresh merge", "exchanges", "of ‖ΔW‖")
        panel.legend(frameon=False, fontsize=8)


SWITCH = Claim(
    id="switch-exact",
    title="Tasks are exchanged quickly, and exactly",
    claim="One base serves many tasks: the adapter folded into it is exchanged for another, quickly and with little memory.",
    source="Hu et al. 2021, §4.1",
    design=f"{SWITCHES} switches (quick: 20) among four adapters of ranks 4 to 32 in random order, in fp32 and bf16; sha256 of every tensor against "
    "a fresh merge of the last adapter, and after unmerge against the base. Holds if none differs and the median switch takes less time than loading the base.",
    expected="a quick operation with very little memory; lorasmith's promise: bit-identical",
    measure=measure_switch,
    draw=draw_switch,
)
DRIFT = Claim(
    id="subtract-and-add",
    title="W0 comes back by subtracting BA",
    claim="To switch tasks, W0 is recovered by subtracting BA, and another B′A′ is added.",
    source="Hu et al. 2021, §4.1; microsoft/LoRA and PEFT do it in the weights' own dtype",
    design=f"{SWITCHES} exchanges among three adapters, literally W −= ΔW, W += ΔW′ in fp32, bf16 and fp16, ‖ΔW‖ = {SHARE} ‖W‖ as in the paper's Table 7 (0.11); all linear layers of "
    f"10 decoder layers (quick: 3). Distance to round(W0 + ΔW), relative to ‖ΔW‖. Holds if it stays within {TOLERATED:.0%} in every dtype.",
    expected="W0 recovered; the paper says nothing of rounding",
    measure=measure_drift,
    draw=draw_drift,
)
