"""`Adapter`: the one value that passes between rooms."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasmith.lora.config import LoRAConfig
from lorasmith.lora.factors import Factors


@dataclass(slots=True)
class Adapter:
    """A trained LoRA set. It holds no `nn.Module`.

    Attributes:
        config: how it was made.
        factors: module path → `Factors`.
        biases: module path → the trained bias that replaces the base's, shape (out_features,).
        provenance: what the sidecar beside the files says (base and data fingerprints, versions);
            empty for adapters of other tools.
    """

    config: LoRAConfig
    factors: dict[str, Factors]
    biases: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """Σ rank · (in_features + out_features), and the biases."""
        low_rank = sum(f.A.numel() + f.B.numel() for f in self.factors.values())
        return low_rank + sum(b.numel() for b in self.biases.values())

    @property
    def num_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def digest(self) -> str:
        """sha256 over every path, scaling, dtype, shape and byte: equal digests, equal function."""
        h = hashlib.sha256()
        for path, factors in sorted(self.factors.items()):
            h.update(f"{path} {factors.scaling.hex()}\n".encode())
        for name, tensor in sorted(self.tensors().items()):
            h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            h.update(_raw_bytes(tensor))
        return h.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: `<path>.A`, `<path>.B`, `<path>.bias`."""
        named = {f"{path}.{part}": getattr(f, part) for path, f in self.factors.items() for part in "AB"}
        return named | {f"{path}.bias": bias for path, bias in self.biases.items()}


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
