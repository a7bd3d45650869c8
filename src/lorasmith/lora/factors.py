"""`Factors`: the low-rank pair of one module."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(slots=True)
class Factors:
    """delta = scaling · B @ A for one module.

    `A` and `B` are plain tensors, never parameters of a module, and may be edited in place.
    """

    A: Float[Tensor, "rank in_features"]
    B: Float[Tensor, "out_features rank"]
    scaling: float

    @property
    def rank(self) -> int:
        """Inner dimension of B @ A."""
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.B.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """The same factors elsewhere or in another dtype."""
        return replace(self, A=self.A.to(device, dtype), B=self.B.to(device, dtype))

    def clone(self) -> Factors:
        """An independent copy."""
        return replace(self, A=self.A.detach().clone(), B=self.B.detach().clone())
