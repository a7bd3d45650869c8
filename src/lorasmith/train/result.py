"""`TrainResult`: what a run reports."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorasmith.lora import Adapter


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`.

    Attributes:
        adapter: the trained adapter (of the best evaluation, where there was one); None for full
            fine-tuning.
        train_loss: nats per supervised token, mean over the last tenth of the steps.
        eval_loss: the best one, that of `adapter`.
        tokens_per_s: tokens of the examples over the time of the training steps.
        peak_rss_bytes: of the process that needed most.
        interrupted: a signal stopped the run; it goes on with `resume=True`.
        processes: that trained together.
    """

    adapter: Adapter | None
    adapter_dir: Path
    steps: int
    train_loss: float | None
    eval_loss: float | None
    tokens_per_s: float
    tokens: int
    supervised_tokens: int
    trainable_params: int
    total_params: int
    peak_rss_bytes: int
    wall_s: float
    resumed_from_step: int | None
    interrupted: bool = False
    processes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "adapter"}
        return values | {"adapter_dir": str(self.adapter_dir)}
