"""LoRA on a convolution: A convolves with the base's kernel, stride and padding into `rank` channels, B is 1×1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lorasmith.inject.kinds import layer_shape
from lorasmith.inject.layer import LoRALayer
from lorasmith.lora import Layout, gather, group_spans, spread

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoRAConv(LoRALayer):
    """y = conv(x) + scaling · conv₁(B, conv(A, dropout(x))), as PEFT computes it.

    A sees all input channels, also where the base has groups; B has the base's groups, and
    `lora_B` holds only its blocks: (out_channels, rank / groups).
    """

    def _add_to_base(self, x: Tensor) -> Tensor:
        y = self.base_forward(x)
        return y + self.low_rank(F.dropout(x, self.lora_dropout, self.training)).to(y.dtype)

    def low_rank(self, x: Tensor) -> Tensor:
        """scaling · B(A(x)), shape (batch, out_channels, …)."""
        module: Any = self
        conv = _CONV[len(module.kernel_size)]
        A = self.lora_A.to(x.dtype).view(-1, module.in_channels, *module.kernel_size)
        B = (self.lora_B * self.lora_scaling).to(x.dtype)
        u = conv(x, A, None, module.stride, module.padding)
        return conv(u, B.view(*B.shape, *(1 for _ in module.kernel_size)), groups=module.groups)

    def whole_B(self) -> Tensor:
        """B (out_channels, rank); a copy where the base has groups."""
        B, groups = self.lora_B.data, self._layout.groups
        return B if groups == 1 else spread(B, group_spans(B.shape[0], groups), B.shape[0])

    def stored_B(self, B: Tensor) -> Tensor:
        """Only the blocks of B, where the base has groups."""
        groups = self._layout.groups
        return B if groups == 1 else gather(B, group_spans(B.shape[0], groups))

    @property
    def _layout(self) -> Layout:
        shape = layer_shape(self)
        assert shape is not None
        return shape.layout
