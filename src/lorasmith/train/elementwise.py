"""What a decoder layer computes between its matrix products, each in one pass through memory.

`operations` gives the C functions where they can be had, else the same in plain torch, which is
also what they are tested against.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorasmith.bases import home
from lorasmith.native import is_enabled, load
from lorasmith.train.elementwise_source import SOURCE


class Operations:
    """In plain torch, for every dtype and device."""

    name = "torch"

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight · x / √(mean(x²) + eps), rounded before the product as RMSNorm does."""
        return weight * (_wide(x) * _inverse_rms(x, eps)).to(x.dtype)

    def norm_backward(self, dh: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
        """residual + the gradient of x where `dh` is that of norm(x)."""
        r = _inverse_rms(x, eps)
        d, normal = _wide(dh) * weight, _wide(x) * r
        return (residual + r * (d - normal * (d * normal).mean(-1, keepdim=True))).to(x.dtype)

    def rotate_(self, x: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False) -> Tensor:
        """x (batch, slots, heads, d) turned in place by its slot's angles, (1 or batch, slots, d)."""
        c, s = cosine[:, :, None], sine[:, :, None]
        turned = _turn_back(x * s) if back else _turn(x) * s
        return x.copy_(x * c + turned)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up."""
        return F.silu(gate).mul_(up)

    def silu_mul_backward(self, dm: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        g, d = _wide(gate), _wide(dm)
        s = torch.sigmoid(g)
        return (d * up * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)

    def cross_entropy_(self, z: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Loss of each row; the logits z (rows, vocabulary) become its gradient with respect to them."""
        log_p = torch.log_softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32))
        losses = -(1 - smoothing) * log_p.gather(1, targets[:, None])[:, 0]
        if smoothing:
            losses -= smoothing * log_p.mean(1)
        p = log_p.exp_()
        if smoothing:
            p.sub_(smoothing / p.shape[1])
        p.scatter_add_(1, targets[:, None], p.new_full((len(targets), 1), smoothing - 1.0))
        z.copy_(p)
        return losses


class NativeOperations(Operations):
    """The same through the C functions, for contiguous tensors of one dtype on the CPU."""

    name = "C"

    def __init__(self, library: Any, suffix: str) -> None:
        for function in _SIGNATURES:
            setattr(self, "_" + function, getattr(library, f"{function}_{suffix}"))

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As in `Operations`."""
        x, h = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        self._norm(*_rows(x), _at(x), _at(weight), eps, _at(h), _threads())  # type: ignore[attr-defined]
        return h

    def norm_backward(self, dh: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
        """As in `Operations`."""
        dh, x, residual = dh.contiguous(), x.contiguous(), residual.contiguous()
        out = torch.empty_like(x)
        self._norm_backward(  # type: ignore[attr-defined]
            *_rows(x), _at(dh), _at(x), _at(weight), eps, _at(residual), _at(out), _threads()
        )
        return out

    def rotate_(self, x: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False) -> Tensor:
        """As in `Operations`."""
        if not x.is_contiguous() or cosine.shape[-1] != x.shape[3] or cosine.dtype != x.dtype:
            return super().rotate_(x, cosine, sine, back=back)
        batch, slots, heads, d = x.shape
        cosine, sine = cosine.contiguous(), sine.contiguous()
        repeats = int(len(cosine) == 1)
        self._rotate(  # type: ignore[attr-defined]
            batch * slots,
            heads,
            d,
            _at(x),
            _at(cosine),
            _at(sine),
            slots,
            repeats,
            -1.0 if back else 1.0,
            _threads(),
        )
        return x

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As in `Operations`."""
        gate, up = gate.contiguous(), up.contiguous()
        m = torch.empty_like(gate)
        self._silu_mul(gate.numel(), _at(gate), _at(up), _at(m), _threads())  # type: ignore[attr-defined]
        return m

    def silu_mul_backward(self, dm: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Operations`."""
        dm, gate, up = dm.contiguous(), gate.contiguous(), up.contiguous()
        dg, dp = torch.empty_like(gate), torch.empty_like(up)
        self._silu_mul_backward(  # type: ignore[attr-defined]
            gate.numel(), _at(dm), _at(gate), _at(up), _at(dg), _at(dp), _threads()
        )
        return dg, dp

    def cross_entropy_(self, z: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """As in `Operations`."""
        lowest, highest = targets.aminmax() if len(targets) else (0, 0)
        if not z.is_contiguous() or lowest < 0 or highest >= z.shape[1]:  # torch names a target out of range
            return super().cross_entropy_(z, targets, smoothing)
        losses, targets = torch.empty(len(z)), targets.contiguous()
        self._cross_entropy(*z.shape, _at(z), _at(targets), smoothing, _at(losses), _threads())  # type: ignore[attr-defined]
        return losses


def operations(dtype: torch.dtype, device: torch.device) -> Operations:
    """The fastest that serve tensors of this dtype on this device."""
    suffix = {torch.bfloat16: "bf16", torch.float32: "f32"}.get(dtype)
    if device.type == "cpu" and suffix and is_enabled() and (library := _library()) is not None:
        return NativeOperations(library, suffix)
    return Operations()


_P, _N, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "norm": (_N, _N, _P, _P, _F, _P, _N),
    "norm_backward": (_N, _N, _P, _P, _P, _F, _P, _P, _N),
    "rotate": (_N, _N, _N, _P, _P, _P, _N, _N, _F, _N),
    "silu_mul": (_N, _P, _P, _P, _N),
    "silu_mul_backward": (_N, _P, _P, _P, _P, _P, _N),
    "cross_entropy": (_N, _N, _P, _P, _F, _P, _N),
}


@functools.cache
def _library() -> Any:
    signatures = {
        f"{name}_{suffix}": args for name, args in _SIGNATURES.items() for suffix in ("bf16", "f32")
    }
    try:  # a fused multiply-add would round once where torch's two operations round twice
        return load(
            SOURCE, signatures, folder=home() / "native", flags=("-ffp-contract=off", "-fno-trapping-math")
        )
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _at(x: Tensor) -> int:
    return x.data_ptr()


def _threads() -> int:
    return torch.get_num_threads()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(_wide(x).pow(2).mean(-1, keepdim=True) + eps)


def _turn(x: Tensor) -> Tensor:
    """The rotation's quarter turn: (a, b) becomes (−b, a)."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _turn_back(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((b, -a), -1)
