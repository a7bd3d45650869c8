"""`QuantisedLinear`: a frozen linear layer whose weight exists in full only while it is multiplied with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorasmith.quantised.codes import (
    dequantise_int8,
    dequantise_nf4,
    dequantise_scales,
    quantise_int8,
    quantise_nf4,
    quantise_scales,
)
from lorasmith.quantised.scratch import scratch


class QuantisedLinear(nn.Linear, ABC):
    """y = x @ Wᵀ + b with W = dequantise(codes), made anew for each product, forward and backward.

    Scales are float32 numbers kept as the int32 of the same bits, so that `model.to(dtype)` leaves them alone.

    Attributes:
        kind: name of the format.
        dtype: of `weight`; a product makes W in the dtype of its input.
    """

    kind: str
    codes: Tensor
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, *, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.register_parameter("bias", bias)
        for name, value in self.packed(weight).items():
            self.register_buffer(name, value.view(torch.int32) if value.dtype == torch.float32 else value)

    @staticmethod
    @abstractmethod
    def packed(weight: Tensor) -> dict[str, Tensor]:
        """Name of each buffer → what it holds of `weight`."""

    @abstractmethod
    def dequantise(self, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        """W, (out_features, in_features), in `out` (at least `whole_numel`,) or a new tensor."""

    @property
    def whole_numel(self) -> int:
        """Numbers that `dequantise` writes, what fills the last block included."""
        return self.out_features * self.in_features

    def borrow(self, dtype: torch.dtype) -> Tensor:
        """W in this thread's scratch: to be multiplied with at once, for the next layer's W overwrites it."""
        return self.dequantise(dtype, out=scratch(self.whole_numel, dtype, self.codes.device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W, made anew at each access: for what reads it once."""
        return self.dequantise(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Of codes and scales."""
        return sum(buffer.nbytes for buffer in self.buffers(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        if torch.is_grad_enabled():
            return _Product.apply(x, self.bias, self)  # type: ignore[no-any-return, no-untyped-call]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return F.linear(x, self.borrow(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """As `nn.Linear`, and the format."""
        return f"{super().extra_repr()}, {self.kind}"

    def _float(self, name: str) -> Tensor:
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer.view(torch.float32)


class NF4Linear(QuantisedLinear):
    """4 bits a weight, 8 a block of 64, 32 each 256 blocks: 4.127 bits."""

    kind = "nf4"
    scales: Tensor

    @staticmethod
    def packed(weight: Tensor) -> dict[str, Tensor]:
        """As in `QuantisedLinear`."""
        codes, absmax = quantise_nf4(weight)
        scales, outer, mean = quantise_scales(absmax)
        return {"codes": codes, "scales": scales, "outer": outer, "mean": mean[None]}

    def dequantise(self, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        """As in `QuantisedLinear`."""
        absmax = dequantise_scales(self.scales, self._float("outer"), self._float("mean"))
        return dequantise_nf4(self.codes, absmax, (self.out_features, self.in_features), dtype, out=out)

    @property
    def whole_numel(self) -> int:
        """As in `QuantisedLinear`."""
        return 2 * self.codes.numel()


class Int8Linear(QuantisedLinear):
    """8 bits a weight, 32 a row."""

    kind = "int8"

    @staticmethod
    def packed(weight: Tensor) -> dict[str, Tensor]:
        """As in `QuantisedLinear`."""
        codes, scale = quantise_int8(weight)
        return {"codes": codes, "scale": scale}

    def dequantise(self, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        """As in `QuantisedLinear`."""
        return dequantise_int8(self.codes, self._float("scale"), dtype, out=out)


class _Product(torch.autograd.Function):
    """x @ Wᵀ + b that keeps the layer, not its weight, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantisedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer._product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_b, _ = ctx.needs_input_grad
        dx = (g @ ctx.layer.borrow(g.dtype)).to(ctx.dtype) if needs_x else None
        db = g.reshape(-1, g.shape[-1]).sum(0, dtype=ctx.layer.bias.dtype) if needs_b else None
        return dx, db, None
