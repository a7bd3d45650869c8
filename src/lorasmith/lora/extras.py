"""`Extras`: what some adapters train besides low-rank factors and biases."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class TokenRows:
    """Rows of an embedding: row `indices[i]` of the weight becomes `values[i]`, of shape (rows, width)."""

    indices: tuple[int, ...]
    values: Tensor


@dataclass(slots=True)
class Extras:
    """Empty for plain LoRA.

    Attributes:
        weights: parameter name → the trained tensor that replaces the base's (`modules_to_save`).
        rows: path of an embedding, or of an output head tied to it → its trained rows.
        shifts: module path → b in y += scaling · (B(A(x)) + b), shape (out_features,) (`lora_bias`).
        magnitudes: module path → m of DoRA (arXiv 2402.09353), shape (out_features,): the weight is
            m · V / ‖V‖ row by row, with V = W0 + scaling · B @ A.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, TokenRows] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.weights or self.rows or self.shifts or self.magnitudes)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {
            **self.weights,
            **{f"{path}.rows": rows.values for path, rows in self.rows.items()},
            **{f"{path}.shift": shift for path, shift in self.shifts.items()},
            **{f"{path}.magnitude": m for path, m in self.magnitudes.items()},
        }

    def to(self, dtype: torch.dtype | None = None) -> Extras:
        """An independent, contiguous copy on the CPU."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", dtype, copy=True).contiguous()

        return Extras(
            {name: copy(t) for name, t in self.weights.items()},
            {path: TokenRows(r.indices, copy(r.values)) for path, r in self.rows.items()},
            {path: copy(t) for path, t in self.shifts.items()},
            {path: copy(t) for path, t in self.magnitudes.items()},
        )

    def __str__(self) -> str:
        """`2 whole weights, DoRA magnitudes of 14 modules`."""
        said = (
            (self.weights, "whole trained weights"),
            (self.rows, "embeddings with trained token rows"),
            (self.shifts, "modules with a bias inside the factors"),
            (self.magnitudes, "modules with a DoRA magnitude"),
        )
        return ", ".join(f"{len(of)} {what}" for of, what in said if of)
