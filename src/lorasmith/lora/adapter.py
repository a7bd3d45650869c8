"""`Adapter`: the one value that passes between rooms."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasmith.lora.config import LoRAConfig
from lorasmith.lora.extras import Extras
from lorasmith.lora.factors import LINEAR, Factors


@dataclass(slots=True)
class Adapter:
    """A trained LoRA set. It holds no `nn.Module`.

    Attributes:
        config: how it was made.
        factors: module path → `Factors`.
        biases: module path → the trained bias that replaces the base's, shape (out_features,).
        provenance: what the sidecar beside the files says (base and data fingerprints, versions);
            empty for adapters of other tools.
        extras: whole weights, token rows, DoRA magnitudes and the like; empty for plain LoRA.
    """

    config: LoRAConfig
    factors: dict[str, Factors]
    biases: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    extras: Extras = field(default_factory=Extras)

    @property
    def num_params(self) -> int:
        """Σ rank · (in_features + out_features), the biases and the extras."""
        return sum(t.numel() for t in self.tensors().values())

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
            if factors.layout != LINEAR:
                h.update(f"{factors.layout}\n".encode())
        for path, rows in sorted(self.extras.rows.items()):
            h.update(f"{path} {rows.indices}\n".encode())
        for name, tensor in sorted(self.tensors().items()):
            h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            h.update(_raw_bytes(tensor))
        return h.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: `<path>.A`, `<path>.B`, `<path>.bias`, and those of the extras."""
        named = {f"{path}.{part}": getattr(f, part) for path, f in self.factors.items() for part in "AB"}
        biases = {f"{path}.bias": bias for path, bias in self.biases.items()}
        return named | biases | self.extras.tensors()

    @property
    def beyond_linear(self) -> str:
        """What is here besides factors of linear layers and biases, in words; empty for plain LoRA."""
        kinds = Counter(f.layout.kind for f in self.factors.values() if f.layout != LINEAR)
        said = [f"{count} {kind} modules" for kind, count in kinds.items()]
        return ", ".join([*said, *([str(self.extras)] if self.extras else [])])


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
