"""Merging rules that look at single elements, so they need each delta in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(deltas: Sequence[Tensor], *, weights: Sequence[float], density: float) -> Tensor:
    """TIES (arXiv 2306.01708): trim, elect a sign for each element, average those that agree.

    Each wᵢ·Δᵢ keeps its largest `density` share by magnitude. The elected sign is that of their sum.
    The result is the mean over the values, of those left, that carry it; so equal weights are the
    paper's λ. The paper trims over the whole model at once; here each module is trimmed by itself.
    """
    trimmed = torch.stack([w * trim(d, density) for w, d in zip(weights, deltas, strict=True)])
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trim(delta: Tensor, density: float) -> Tensor:
    """`delta` with all but the largest `density` share of its elements set to zero."""
    flat = delta.reshape(-1)
    count = max(1, round(density * flat.numel()))
    kept = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(delta)


def dare(
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float],
    density: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """DARE (arXiv 2311.03099): drop each element with probability 1 − density, divide the rest by density.

    The weighted sum of what is left; its expectation is the weighted sum of the deltas.
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight, generator in zip(deltas, weights, generators, strict=True):
        keep = torch.rand(delta.shape, generator=generator).to(delta.device) < density
        total += (weight / density) * delta * keep
    return total
