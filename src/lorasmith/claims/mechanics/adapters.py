"""Adapters with random B, for claims that need one which does something but not one that learned."""

from __future__ import annotations

import torch
from torch import nn

from lorasmith.inject import eject, extract, inject
from lorasmith.lora import Adapter, LoRAConfig

QV = r".*\.(q_proj|v_proj)"
SHARE = 0.1
"""‖ΔW‖ / ‖W‖ of each module; the paper's Table 7 has 6.91 / 61.95."""


def random_adapter(model: nn.Module, config: LoRAConfig, *, seed: int = 0) -> Adapter:
    """Factors of `config` with a random B of such a size that ‖ΔW‖ is `SHARE` of ‖W‖, module by module."""
    inject(model, config, seed=seed)
    adapter = extract(model)
    eject(model)
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    for path, f in adapter.factors.items():
        f.B.normal_(generator=generator)
        # ‖B·A‖² = trace((BᵀB)(AAᵀ)), without forming it
        norm = f.scaling * float(((f.B.T @ f.B) * (f.A @ f.A.T)).sum()) ** 0.5
        f.B.mul_(SHARE * float(weights[f"{path}.weight"].detach().float().norm()) / norm)
    return adapter
