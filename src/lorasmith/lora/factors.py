"""`Factors`: the low-rank pair of one module, and `Layout`: how that module stores its weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

LayerKind = Literal["linear", "embedding", "conv", "expert"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layer that is not linear stores the matrix that B @ A is added to.

    Attributes:
        kind: `"linear"` (out_features, in_features); `"embedding"` the transpose, over one-hot inputs;
            `"conv"` (out_channels, in_channels, *kernel), flattened after its first axis;
            `"expert"` one matrix of a stacked parameter, whose path ends in the expert's number.
        kernel: of a convolution, per axis.
        groups: of a convolution. B @ A then spans all input channels, which the layer's own weight
            does not, and B is zero outside its diagonal blocks.
    """

    kind: LayerKind = "linear"
    kernel: tuple[int, ...] = ()
    groups: int = 1


LINEAR = Layout()


@dataclass(slots=True)
class Factors:
    """delta = scaling · B @ A for one module.

    `A` and `B` are plain tensors, never parameters of a module, and may be edited in place.
    """

    A: Float[Tensor, "rank in_features"]
    B: Float[Tensor, "out_features rank"]
    scaling: float
    layout: Layout = LINEAR

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
