"""Bytes on disk: one adapter against one model, and a hundred tasks."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.mechanics.adapters import QV, random_adapter
from lorasmith.claims.mechanics.gpt3 import CONFIG as GPT3_CONFIG
from lorasmith.claims.mechanics.gpt3 import LAYERS, PARAMS, SHAPES, WIDTH, memories
from lorasmith.drawing import COLOURS, label, panels
from lorasmith.formats import write_adapter
from lorasmith.lora import Adapter, LoRAConfig
from lorasmith.planning import Shapes, hundred_tasks_bytes, lora_memory

RANKS, TASKS, CLOSE, HALF = (1, 4, 16), 100, 0.1, 2
HEADER_BYTES = 20_000
"""Of a task's config and tensor headers, which tiny adapters are mostly made of."""
PAPER_RATIO, PAPER_BYTES, PAPER_HUNDRED, PAPER_MODELS = 10_000, 35e6, 354e9, 35e12


def measure_ratio(setting: Setting) -> Measured:
    """Files written, and GPT-3's numbers by the same formula."""
    key = {"claim": "checkpoint", "version": 1, "ranks": list(RANKS)}
    found = setting.cached(key, lambda: _files(setting))
    rows = [
        {
            "adapter": f"q and v, rank {f['rank']}, bf16",
            "formula, bytes": f["formula"],
            "file, bytes": f["file"],
        }
        | {"base, bytes": found["base"], "times smaller": found["base"] / f["file"]}
        for f in found["files"]
    ]
    lora, full = memories()
    by_formula = full.checkpoint_bytes / lora.checkpoint_bytes
    assert lora.trainable_params == 2 * LAYERS * 2 * WIDTH * GPT3_CONFIG.rank
    rows.append(
        {
            "adapter": "GPT-3 175B, q and v, rank 4",
            "formula, bytes": lora.checkpoint_bytes,
            "file, bytes": None,
        }
        | {"base, bytes": full.checkpoint_bytes, "times smaller": by_formula}
    )
    exact = all(agrees(f["file"], f["formula"]) for f in found["files"])
    rank4 = next(r for r, f in zip(rows, found["files"], strict=False) if f["rank"] == 4)
    near = (
        abs(by_formula / PAPER_RATIO - 1) <= CLOSE and abs(lora.checkpoint_bytes / PAPER_BYTES - 1) <= CLOSE
    )
    here = rank4["times smaller"] >= PAPER_RATIO * (1 - CLOSE)
    verdict = Holds.NO if not (exact and near) else Holds.YES if here else Holds.NOT_AT_THIS_SCALE
    said = (
        f"Here the rank-4 adapter's file is {rank4['file, bytes'] / 1e6:.2f} MB, {rank4['times smaller']:,.0f} times smaller than the base's {found['base'] / 1e6:,.0f} MB; the formula's bytes and "
        f"{found['files'][1]['file'] / found['files'][1]['formula'] - 1:.1%} for the header and config. The ratio grows with width, since 2·L·2·d·r is linear in it: GPT-3 by the same code has {by_formula:,.0f} "
        f"({lora.checkpoint_bytes / 1e6:.1f} MB = {lora.checkpoint_bytes / 2**20:.1f} MiB against {full.checkpoint_bytes / 1e9:.1f} GB). Counted, not sampled; no interval."
    )
    figures = {"gpt3_ratio": by_formula, "gpt3_params": PARAMS, "gpt3_lora_params": lora.trainable_params}
    return Measured(verdict, said, figures, rows)


def _files(setting: Setting) -> dict[str, Any]:
    model = setting.load().model
    files = []
    with tempfile.TemporaryDirectory() as scratch:
        for rank in RANKS:
            adapter = _half(random_adapter(model, LoRAConfig(rank=rank, alpha=2 * rank, targets=QV)))
            write_adapter(adapter, Path(scratch) / str(rank))
            size = bytes_of(Path(scratch) / str(rank))
            files.append({"rank": rank, "formula": adapter.num_bytes, "file": size})
    return {"files": files, "base": HALF * sum(p.numel() for p in model.parameters())}


def _half(adapter: Adapter) -> Adapter:
    """bf16, the two bytes a number that the paper counts (lorasmith trains float32 masters)."""
    return replace(adapter, factors={p: f.to(dtype=torch.bfloat16) for p, f in adapter.factors.items()})


def bytes_of(folder: Path) -> int:
    """All files in `folder`."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def agrees(written: float, formula: float, *, tasks: int = 1) -> bool:
    """Whether files hold what the formula says, and little else."""
    return 0 <= written - formula <= max(CLOSE * formula, HEADER_BYTES * tasks)


def draw_ratio(found: Measured, path: Path) -> None:
    """How many times smaller, logarithmic."""
    with panels(path, width=9, height=2.4) as (panel,):
        names, values = [r["adapter"] for r in found.rows], [r["times smaller"] for r in found.rows]
        panel.barh(names, values, color=[*[COLOURS[0]] * (len(names) - 1), COLOURS[1]])
        for k, value in enumerate(values):
            panel.text(value, k, f" {value:,.0f}", va="center", fontsize=8)
        panel.axvline(PAPER_RATIO, color="#c9d1db", linewidth=1)
        panel.set_xscale("log")
        panel.set_xlim(10, 60_000)
        label(panel, "how many times smaller than the model a task's file is (grey: the paper's 10,000)")


def measure_hundred(setting: Setting) -> Measured:
    """Adapters for a hundred tasks, really written."""
    tasks = 20 if setting.quick else TASKS
    key = {"claim": "hundred", "version": 1, "tasks": tasks, "rank": 4}
    found = setting.cached(key, lambda: _write_many(setting, tasks))
    shapes = Shapes(found["params"], HALF, {p: (rows, cols) for p, rows, cols in found["linears"]})
    formula = hundred_tasks_bytes(shapes, lora_memory(shapes, LoRAConfig(rank=4), master_bytes=HALF))
    written = found["base"] + found["written"] / tasks * TASKS
    models = TASKS * found["base"]
    lora, full = memories()
    gpt3, gpt3_models = hundred_tasks_bytes(SHAPES, lora), hundred_tasks_bytes(SHAPES, full)
    rows = [
        {"base": "here", "one base and 100 adapters, formula": formula, "from files": written}
        | {"100 models": models, "times less": models / written},
        {"base": "GPT-3 175B", "one base and 100 adapters, formula": gpt3, "from files": None}
        | {"100 models": gpt3_models, "times less": gpt3_models / gpt3},
    ]
    near = abs(gpt3 / PAPER_HUNDRED - 1) <= CLOSE and abs(gpt3_models / PAPER_MODELS - 1) <= CLOSE
    exact = agrees(written, formula, tasks=TASKS)
    said = (
        f"{tasks} adapters (q and v, rank 4, bf16) written take {found['written'] / 1e6:.1f} MB; a hundred and their base {written / 1e6:,.0f} MB against {models / 1e9:.1f} GB "
        f"for a hundred models, {models / written:.0f} times less. GPT-3 by the same code: {gpt3 / 1e9:.1f} GB against {gpt3_models / 1e12:.1f} TB (35 TB; 350 TB, as sometimes told, is a slip). Counted; no interval."
    )
    return Measured(Holds.YES if near and exact and written < models / 10 else Holds.NO, said, {}, rows)


def _write_many(setting: Setting, tasks: int) -> dict[str, Any]:
    model = setting.load().model
    with tempfile.TemporaryDirectory() as scratch:
        for k in range(tasks):
            adapter = random_adapter(model, LoRAConfig(rank=4, alpha=8, targets=QV), seed=k)
            write_adapter(_half(adapter), Path(scratch) / f"task-{k}")
        size = bytes_of(Path(scratch))
    linears = [[path, f.out_features, f.in_features] for path, f in adapter.factors.items()]
    params = sum(p.numel() for p in model.parameters())
    return {"written": size, "params": params, "base": HALF * params, "linears": linears}


def draw_hundred(found: Measured, path: Path) -> None:
    """One base with adapters beside a model per task, for this base and GPT-3."""
    with panels(path, 2, width=4.5, height=2.4) as both:
        for panel, row, unit, name in zip(both, found.rows, (1e9, 1e12), ("GB", "TB"), strict=True):
            values = [
                (row["from files"] or row["one base and 100 adapters, formula"]) / unit,
                row["100 models"] / unit,
            ]
            panel.barh(["one base,\n100 adapters", "100 models"], values, color=COLOURS[:2])
            for k, value in enumerate(values):
                panel.text(value, k, f" {value:.2f} {name}", va="center", fontsize=8)
            panel.set_xlim(0, 1.25 * max(values))
            label(panel, f"a hundred tasks, {row['base']}", name)


RATIO = Claim(
    id="checkpoint-ratio",
    title="A task's file is ten thousand times smaller",
    claim="With r = 4 on q and v a GPT-3 checkpoint shrinks about 10,000 times, from 350 GB to 35 MB.",
    source="Hu et al. 2021, §4.2",
    design=f"Adapters on q and v of ranks {', '.join(map(str, RANKS))}, bf16, written to disk; all bytes of each folder counted against two bytes for each parameter of the base. "
    f"GPT-3 (L = {LAYERS}, d = {WIDTH:,}) by the same formula. Holds if files are what the formula says and at most {CLOSE:.0%} or 20 kB of headers more, and GPT-3's numbers within 10 % of the paper's, and the rank-4 file here is 9,000 "
    "times smaller too; not at this scale if only the last fails.",
    expected="10,000 (175,255.8 M / 18.87 M parameters: 9,285), 35 MB (exactly 37.7 MB = 36.0 MiB)",
    measure=measure_ratio,
    draw=draw_ratio,
)
HUNDRED = Claim(
    id="hundred-tasks",
    title="A hundred tasks on one base",
    claim="A hundred adapted models need 354 GB instead of 35 TB: one base and a small file for each task.",
    source="Hu et al. 2021, §4.2, footnote",
    design=f"{TASKS} adapters (quick: 20, scaled up) on q and v, rank 4, bf16, really written and counted, with the base once; a hundred bases for contrast; GPT-3 by the same formula. Holds if files "
    f"are what the formula says and little more, GPT-3's within {CLOSE:.0%} of the paper's, and adapters take less than a tenth here.",
    expected="354 GB against 35 TB",
    measure=measure_hundred,
    draw=draw_hundred,
)
