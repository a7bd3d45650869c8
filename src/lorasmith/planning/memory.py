"""What a run keeps in memory and on disk besides activations, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorasmith.lora import LoRAConfig

FP32_BYTES = 4


@dataclass(frozen=True)
class Shapes:
    """A base as numbers: `params` in all, of `itemsize` bytes; `linears`: path → (out, in)."""

    params: int
    itemsize: int
    linears: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose.

    Attributes:
        optimizer_bytes: Adam's two moments.
        checkpoint_bytes: one finished task on disk.
    """

    trainable_params: int
    weights_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    checkpoint_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def lora_memory(shapes: Shapes, config: LoRAConfig) -> Memory:
    """LoRA: Σ rank · (in + out) parameters train, in float32; the base needs no gradient."""
    trained = sum(config.rank_of(p) * (rows + cols) for p, (rows, cols) in shapes.linears.items())
    size = trained * FP32_BYTES
    return Memory(trained, shapes.params * shapes.itemsize, size, size, 2 * size, size)


def full_memory(shapes: Shapes) -> Memory:
    """Full fine-tuning: every weight has a gradient and two moments of its own."""
    size = shapes.params * shapes.itemsize
    return Memory(shapes.params, size, 0, size, 2 * size, size)
