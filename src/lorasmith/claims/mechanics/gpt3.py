"""GPT-3 175B as numbers: what the paper's own row is computed from."""

from __future__ import annotations

from lorasmith.lora import LoRAConfig
from lorasmith.planning import Memory, Shapes, full_memory, lora_memory

LAYERS, WIDTH, HALF_BYTES = 96, 12288, 2
PARAMS = 175_255_800_000  # Table 4: "175,255.8M"
CONFIG = LoRAConfig(rank=4, alpha=4, targets=("q_proj", "v_proj"))
SHAPES = Shapes(
    params=PARAMS,
    itemsize=HALF_BYTES,
    linears={f"layers.{k}.{name}": (WIDTH, WIDTH) for k in range(LAYERS) for name in CONFIG.targets},
)


def memories() -> tuple[Memory, Memory]:
    """(LoRA on q and v at rank 4, full fine-tuning), every number of two bytes as in the paper."""
    return lora_memory(SHAPES, CONFIG, master_bytes=HALF_BYTES), full_memory(SHAPES)
