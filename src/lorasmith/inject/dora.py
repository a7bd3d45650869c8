"""DoRA (arXiv 2402.09353): W = m · V / ‖V‖ row by row, V = W0 + scaling · B @ A. Run as PEFT runs it; off the lean path.

‖V‖ is a constant for the gradient (paper §4.3). Each forward forms V, which costs as much as W0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.inject.conv import LoRAConv
from lorasmith.inject.embedding import LoRAEmbedding
from lorasmith.inject.layer import LoRALayer, shape_of
from lorasmith.lora import rows_of


class DoRALayer(LoRALayer):
    """What the DoRA layers of every kind share: the magnitude, and g = m / ‖V‖."""

    lora_magnitude: nn.Parameter

    @property
    def lora_is_plain(self) -> bool:
        """Never: DoRA is not a low-rank term beside a linear map."""
        return False

    def gain(self) -> Tensor:
        """m / ‖V‖, one number for each output feature."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        with torch.no_grad():
            W = rows_of(weight, transposed=shape_of(self).transposed).to(self.lora_A.dtype)
            norm: Tensor = torch.addmm(W, self.lora_B * self.lora_scaling, self.lora_A).norm(dim=1)
        return self.lora_magnitude / norm


class DoRALinear(DoRALayer):
    """y = base(x) + (g − 1) · W0 x + g · scaling · B(A(x)), where x is dropped out in training."""

    def _add_to_base(self, x: Tensor) -> Tensor:
        y = self.base_forward(x)
        wide = x.to(self.lora_A.dtype)
        low_rank = lambda v: F.linear(F.linear(v, self.lora_A), self.lora_B) * self.lora_scaling  # noqa: E731
        return _dora(self, y, wide, low_rank, self._base_without_bias)

    def _base_without_bias(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[assignment]
        return F.linear(x, rows_of(weight, transposed=shape_of(self).transposed).to(x.dtype))


class DoRAConv(LoRAConv, DoRALayer):
    """The same for a convolution, whose output features are its channels."""

    def _add_to_base(self, x: Tensor) -> Tensor:
        return _dora(
            self, self.base_forward(x), x.to(self.lora_A.dtype), self.low_rank, self._base_without_bias
        )

    def _base_without_bias(self, x: Tensor) -> Tensor:
        module: Any = self
        return module._conv_forward(x, module.weight.to(x.dtype), None)  # type: ignore[no-any-return]


class DoRAEmbedding(LoRAEmbedding, DoRALayer):
    """y = g · (W[t] + scaling · B @ A[:, t])."""

    def _add_to_base(self, x: Tensor) -> Tensor:
        y = self.base_forward(x)
        return (self.gain() * (y + self.low_rank(x))).to(y.dtype)


def _dora(layer: DoRALayer, y: Tensor, x: Tensor, low_rank: Any, base: Any) -> Tensor:
    axes = (1,) * (y.ndim - 2) if isinstance(layer, LoRAConv) else ()
    gain = layer.gain().view(-1, *axes)
    if layer.training and layer.lora_dropout:
        x = F.dropout(x, layer.lora_dropout)
        without_bias = base(x)
    else:
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        without_bias = y if bias is None else y - bias.view(-1, *axes)
    term: Tensor = (gain - 1) * without_bias + gain * low_rank(x)
    return (y + term).to(y.dtype)
