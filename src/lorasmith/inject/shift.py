"""A bias inside the factors (PEFT's `lora_bias`)."""

from __future__ import annotations

from torch import Tensor, nn

from lorasmith.inject.conv import LoRAConv
from lorasmith.inject.layer import LoRALayer


class LoRAShift(LoRALayer):
    """y = what the layer's own kind computes + scaling · b. Mixed in before that kind."""

    lora_shift: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """Adapted output in the base's dtype."""
        y = super().forward(x)
        if not self.lora_is_active:
            return y
        axes = (1,) * (y.ndim - 2) if isinstance(self, LoRAConv) else ()
        return y + (self.lora_shift * self.lora_scaling).to(y.dtype).view(-1, *axes)
