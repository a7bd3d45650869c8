"""Quality: LoRA beside full fine-tuning and the other methods, on three tasks; and its record, scored again."""

from lorasmith.claims.quality.quality import QUALITY
from lorasmith.claims.quality.record import Rescored, rescore

__all__ = ["QUALITY", "Rescored", "rescore"]
