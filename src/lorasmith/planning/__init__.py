"""Bytes and FLOPs predicted before they are spent.

May import: lora, errors.
"""

from lorasmith.planning.memory import Memory, Shapes, full_memory, lora_memory

__all__ = ["Memory", "Shapes", "full_memory", "lora_memory"]
