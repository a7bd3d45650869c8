"""Whether rows of different adapters can share a pass through this model, found by trying."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.inject import Bank, Tenant
from lorasmith.train import Forward

PROBE_SLOTS = 6


@torch.no_grad()
def rows_stay_apart(forward: Forward, bank: Bank, tenant: Tenant) -> bool:
    """Whether a row under an adapter and a row under none get what each gets alone.

    Args:
        bank: attached to the model. tenant: any of its adapters, for its targets.

    A mixture of experts, say, sorts tokens by expert, so an expert no longer knows whose rows it sees.
    """
    generator = torch.Generator().manual_seed(0)

    def noisy(B: Tensor) -> Tensor:
        noise: Tensor = torch.randn(B.shape, generator=generator)
        return torch.empty_like(B).copy_(noise / B.shape[1] ** 0.5)

    loud = {path: replace(f, B=noisy(f.B)) for path, f in tenant.factors.items()}
    before, bank.tenants = bank.tenants, {"loud": Tenant(loud), "none": Tenant({})}
    ids = torch.arange(2 * PROBE_SLOTS, device=forward.device).view(2, -1) * 3 + 1

    def logits(rows: Tensor, *segments: tuple[str, int]) -> Tensor:
        with bank.rows(*segments, training=False):
            found: Tensor = forward.model(input_ids=rows, use_cache=False).logits
        return found.float()

    try:
        together = logits(ids, ("loud", 1), ("none", 1))
        alone = torch.cat([logits(ids[:1], ("loud", 1)), logits(ids[1:], ("none", 1))])
    except RuntimeError:
        return False
    finally:
        bank.tenants = before
    # kernels round differently by shape; an adapter on the wrong rows changes far more than this
    return bool((together - alone).abs().max() <= 0.05 * alone.abs().max())
