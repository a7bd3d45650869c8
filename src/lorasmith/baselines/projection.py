"""Fixed random projections P from d numbers to D weights, and their transposes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

FASTFOOD_WEIGHTS = 4_000_000
"""Up to here `"auto"` takes the paper's projection: beyond, each step would take many passes over the weights."""
DIGEST_ENTRIES = 1 << 16


class Projection(Protocol):
    """P, one block of rows for each tensor, by name."""

    def forward(self, name: str, theta: Tensor) -> Tensor:
        """P_name @ theta, (D_name,), for theta (d,)."""

    def transpose(self, name: str, gradient: Tensor) -> Tensor:
        """P_nameᵀ @ gradient, (d,), for a gradient (D_name,)."""

    def digest(self) -> str:
        """Tells whether another machine's generator drew the same P."""


class Sparse:
    """One entry ±1/√n_j in each row, in a random column j that n_j rows share: columns of norm 1 (Li et al. 2018).

    Kept: an int32 per weight, the column and, from d on, the sign.
    """

    def __init__(self, sizes: Mapping[str, int], d: int, generator: torch.Generator) -> None:
        self.d = d
        self.index = {
            name: torch.randint(2 * d, (size,), generator=generator, dtype=torch.int32)
            for name, size in sizes.items()
        }
        counts = torch.zeros(2 * d, dtype=torch.int64)
        for index in self.index.values():
            for part in torch.split(index, 1 << 22):
                counts += torch.bincount(part, minlength=2 * d)
        self.scale = (counts[:d] + counts[d:]).clamp(min=1).double().rsqrt()

    def forward(self, name: str, theta: Tensor) -> Tensor:
        """See `Projection`."""
        scaled = theta * self.scale.to(theta)
        return torch.cat([scaled, -scaled]).index_select(0, self._index(name, theta))

    def transpose(self, name: str, gradient: Tensor) -> Tensor:
        """See `Projection`."""
        sums = gradient.new_zeros(2 * self.d).index_add_(0, self._index(name, gradient), gradient)
        return (sums[: self.d] - sums[self.d :]) * self.scale.to(gradient)

    def digest(self) -> str:
        """See `Projection`."""
        return _digest(index[:DIGEST_ENTRIES] for index in self.index.values())

    def _index(self, name: str, like: Tensor) -> Tensor:
        if self.index[name].device != like.device:
            self.index[name] = self.index[name].to(like.device)
        return self.index[name]


class Fastfood:
    """H G Π H B / √(n · Σ G²) for each tensor, cut to its D rows (Le et al. 2013; Aghajanyan et al. 2020).

    H is the Hadamard matrix of order n, the power of two that holds both D and d; G a normal diagonal, Π a
    permutation, B a diagonal of signs.
    """

    def __init__(self, sizes: Mapping[str, int], d: int, generator: torch.Generator) -> None:
        self.d, self.sizes = d, dict(sizes)
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, size in sizes.items():
            n = 1 << max(0, max(size, d) - 1).bit_length()
            signs = torch.randint(2, (n,), generator=generator, dtype=torch.int8) * 2 - 1
            gauss = torch.randn(n, generator=generator)
            self.parts[name] = signs, torch.randperm(n, generator=generator), gauss

    def forward(self, name: str, theta: Tensor) -> Tensor:
        """See `Projection`."""
        signs, order, gauss = (t.to(theta.device) for t in self.parts[name])
        x = theta.new_zeros(len(signs))
        x[: self.d] = theta
        x = hadamard(x * signs)[order] * gauss.to(theta)
        return hadamard(x)[: self.sizes[name]] / self._divisor(name)

    def transpose(self, name: str, gradient: Tensor) -> Tensor:
        """See `Projection`."""
        signs, order, gauss = (t.to(gradient.device) for t in self.parts[name])
        x = gradient.new_zeros(len(signs))
        x[: len(gradient)] = gradient
        x = hadamard(x) * gauss.to(gradient)
        x = hadamard(torch.empty_like(x).index_copy_(0, order, x)) * signs
        return x[: self.d] / self._divisor(name)

    def digest(self) -> str:
        """See `Projection`."""
        return _digest(t[:DIGEST_ENTRIES] for part in self.parts.values() for t in part[:2])

    def _divisor(self, name: str) -> float:
        gauss = self.parts[name][2]
        return math.sqrt(len(gauss) * float(gauss.double().square().sum()))


def hadamard(x: Tensor) -> Tensor:
    """H @ x for x (n,), n a power of two; H of ±1 in the natural (Sylvester) order, not normalised."""
    n, step = len(x), 1
    while step < n:
        pairs = x.view(-1, 2, step)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).view(n)
        step *= 2
    return x


def _digest(tensors: object) -> str:
    hash_ = hashlib.sha256()
    for tensor in tensors:  # type: ignore[attr-defined]
        hash_.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return hash_.hexdigest()[:16]
