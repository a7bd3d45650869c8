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


def lora_memory(shapes: Shapes, config: LoRAConfig, *, master_bytes: int = FP32_BYTES) -> Memory:
    """LoRA: Σ rank · (in + out) parameters train; the base needs no gradient and no moments.

    Args:
        master_bytes: of a trained number; lorasmith's factors are float32 (the paper's were 2 bytes).
    """
    trained = sum(config.rank_of(p) * (rows + cols) for p, (rows, cols) in shapes.linears.items())
    size = trained * master_bytes
    return Memory(trained, shapes.params * shapes.itemsize, size, size, 2 * size, size)


def full_memory(shapes: Shapes) -> Memory:
    """Full fine-tuning: every weight has a gradient and two moments of its own."""
    size = shapes.params * shapes.itemsize
    return Memory(shapes.params, size, 0, size, 2 * size, size)


def hundred_tasks_bytes(shapes: Shapes, memory: Memory, *, tasks: int = 100) -> int:
    """Disk for many tasks: one base and an adapter each, or a whole model each where all weights train."""
    if memory.adapter_bytes:
        return shapes.params * shapes.itemsize + tasks * memory.checkpoint_bytes
    return tasks * memory.checkpoint_bytes
