"""Adapters whose method took a part out of the base (PiSSA, OLoRA, CorDA, LoRA-GA), as plain LoRA of twice the rank.

Training started from W − scaling · B0 @ A0 with factors A0, B0, so on the original base the update is
scaling · (B @ A − B0 @ A0) = scaling · [B, −B0] @ [A; A0]. The file holds A and B alone; A0 and B0
are in the adapter as it was saved before the first step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from lorasmith.errors import AdapterFileError
from lorasmith.formats.peft_load import load_adapter
from lorasmith.lora import Adapter, Factors, LoRAConfig


def read_shifted(path: str | Path, initial: str | Path) -> Adapter:
    """The adapter in `path` for the original base, given how it was before its first step.

    Raises:
        AdapterFileError: the two are not the same modules, shapes and scalings; or nothing was trained.
    """
    trained, _ = load_adapter(path, is_shifted=True)
    start, _ = load_adapter(initial, is_shifted=True)
    faults = list(_differences(trained, start))
    if faults:
        shown = "\n  ".join(faults[:20])
        raise AdapterFileError(f"{initial} is not the start of {path}; nothing was loaded.\n  {shown}")
    factors = {p: _difference(f, start.factors[p]) for p, f in trained.factors.items()}
    return replace(trained, config=_doubled(trained.config), factors=factors)


def _difference(f: Factors, f0: Factors) -> Factors:
    return replace(f, A=torch.cat([f.A, f0.A]), B=torch.cat([f.B, -f0.B], dim=1))


def _differences(trained: Adapter, start: Adapter) -> list[str]:
    faults = [f"{p} is in one of them only" for p in sorted(trained.factors.keys() ^ start.factors.keys())]
    for path in trained.factors.keys() & start.factors.keys():
        f, f0 = trained.factors[path], start.factors[path]
        if (f.A.shape, f.B.shape, f.layout) != (f0.A.shape, f0.B.shape, f0.layout):
            faults.append(f"{path}: A {tuple(f.A.shape)} and {tuple(f0.A.shape)}")
        elif f.scaling != f0.scaling:
            faults.append(f"{path}: scaling {f.scaling:g} and {f0.scaling:g}")
        elif f.layout.groups > 1:
            faults.append(f"{path}: a convolution with groups has no difference of the same form")
    same = [
        torch.equal(f.A, start.factors[p].A) and torch.equal(f.B, start.factors[p].B)
        for p, f in trained.factors.items()
        if not faults
    ]
    if same and all(same):
        faults.append(
            "both hold the same factors: one of the folders was given twice, or nothing was trained"
        )
    return faults


def _doubled(config: LoRAConfig) -> LoRAConfig:
    """Twice the rank, and the alpha that leaves every scaling as it was."""
    growth = math.sqrt(2) if config.rslora else 2
    return replace(
        config,
        rank=2 * config.rank,
        alpha=growth * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
    )
