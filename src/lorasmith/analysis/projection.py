"""Training an adapter through few numbers: vec(all increments of A and B) = λ ⊙ P θ.

P has one entry ±1/√n_j in each row, n_j being how many rows share column j (Li et al.'s sparse
projection; Uni-LoRA's). So its columns are orthonormal, expanding is one gather and pulling a
gradient back one scatter-add. λ is one learned number for each tensor (SAID).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Projection:
    """A random map from `dimension` numbers to the tensors of an adapter.

    Attributes:
        theta: (dimension,) the numbers that train, zero at the start.
        scales: (tensors,) λ, one at the start.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], dimension: int, *, seed: int) -> None:
        self.shapes = dict(shapes)
        total = sum(shape.numel() for shape in self.shapes.values())
        generator = torch.Generator().manual_seed(seed)
        # Every column is used before one comes twice, so none is empty while dimension <= total.
        columns = torch.arange(total) % dimension
        self.columns = columns[torch.randperm(total, generator=generator)]
        signs = torch.randint(0, 2, (total,), generator=generator).mul_(2).sub_(1).float()
        counts = torch.bincount(self.columns, minlength=dimension).clamp_(min=1)
        self.entries = signs / counts[self.columns].float().sqrt()
        self.theta = torch.zeros(dimension)
        self.scales = torch.ones(len(self.shapes))

    def expand(self) -> dict[str, Tensor]:
        """Increment of each tensor, by name."""
        flat = self.theta[self.columns] * self.entries
        parts = torch.split(flat, [shape.numel() for shape in self.shapes.values()])
        return {
            name: (part * scale).view(shape)
            for (name, shape), part, scale in zip(self.shapes.items(), parts, self.scales, strict=True)
        }

    def pull_back(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of `theta` and `scales` from those of the tensors: Pᵀ(λ ⊙ g) and ⟨g, Pθ⟩ by tensor."""
        flats = [gradients[name].reshape(-1).float() for name in self.shapes]
        scaled = torch.cat([flat * scale for flat, scale in zip(flats, self.scales, strict=True)])
        of_theta = torch.zeros_like(self.theta).index_add_(0, self.columns, scaled * self.entries)
        plain = torch.split(self.theta[self.columns] * self.entries, [flat.numel() for flat in flats])
        return of_theta, torch.stack([flat @ part for flat, part in zip(flats, plain, strict=True)])
