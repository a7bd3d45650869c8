"""Small adapters on disk, without any model."""

from __future__ import annotations

from pathlib import Path

import torch

from lorasmith.formats import write_adapter
from lorasmith.lora import Adapter, Factors, LoRAConfig

MODULES = {"layers.0.q_proj": (6, 4), "layers.0.v_proj": (6, 4)}
SHAPES = {f"{path}.weight": shape for path, shape in MODULES.items()}


def small_adapter(seed: int = 0, *, rank: int = 2, **provenance: object) -> Adapter:
    """For a base with `SHAPES`; each seed has another digest."""
    g = torch.Generator().manual_seed(seed)
    factors = {
        path: Factors(torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g), 2.0)
        for path, (o, i) in MODULES.items()
    }
    config = LoRAConfig(rank=rank, alpha=2 * rank, targets=("q_proj", "v_proj"))
    return Adapter(config, factors, provenance=dict(provenance))


def write_small(folder: Path, seed: int = 0, **options: object) -> Path:
    path = folder / f"adapter-{seed}"
    write_adapter(small_adapter(seed, **options), path)
    return path
