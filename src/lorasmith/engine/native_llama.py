"""What the fast runner does with one new token per row, through the C functions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.engine import native


class _Attention(ctypes.Structure):
    _fields_ = (
        ("heads", ctypes.c_long),
        ("kv_heads", ctypes.c_long),
        ("width", ctypes.c_long),
        ("scaling", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Positions:
    """Of one step: cache rows and starts (int64), cos and sin (rows, width) in bfloat16."""

    rows: Tensor
    starts: Tensor
    cos: Tensor
    sin: Tensor
    longest: int


class DecodeOps:
    """The operations between the products of a layer. Tensors are bfloat16, contiguous, on the CPU."""

    def __init__(self, heads: int, kv_heads: int, width: int, scaling: float, eps: float) -> None:
        self._library = native.library()
        self._shape = (heads, kv_heads, width, scaling, eps)
        self._eps = eps
        self._heads, self._kv_heads, self._width = heads, kv_heads, width
        self._scratch = torch.empty(0)

    def renewed(self) -> DecodeOps:
        """The same operations with scratch memory of their own, for another thread."""
        return DecodeOps(*self._shape)

    def attention_of(self, q_norm: Tensor | None, k_norm: Tensor | None) -> ctypes.Structure:
        """The constants of one layer's attention."""
        pointers = (None if norm is None else norm.data_ptr() for norm in (q_norm, k_norm))
        return _Attention(*self._shape, *pointers)

    def add_norm(self, x: Tensor, more: Tensor | None, weight: Tensor) -> Tensor:
        """x += more, in place; then RMS norm of x times weight."""
        out = torch.empty_like(x)
        self._library.add_norm(
            x.shape[0],
            x.shape[1],
            x.data_ptr(),
            None if more is None else more.data_ptr(),
            weight.data_ptr(),
            self._eps,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def silu_mul(self, both: Tensor) -> Tensor:
        """silu of the first half of the columns times the second half."""
        out = both.new_empty(both.shape[0], both.shape[1] // 2)
        self._library.silu_mul(
            out.shape[0], out.shape[1], both.data_ptr(), out.data_ptr(), torch.get_num_threads()
        )
        return out

    def attend(
        self, qkv: Tensor, layer: ctypes.Structure, keys: Tensor, values: Tensor, at: Positions
    ) -> Tensor:
        """Turn q and k, write k and v to the cache, attend; (rows, heads · width)."""
        rows = qkv.shape[0]
        group = self._heads // self._kv_heads
        each = 2 * (group + 1) * self._width + group * (at.longest + 1) + 16
        if self._scratch.numel() < rows * self._kv_heads * each:
            self._scratch = torch.empty(rows * self._kv_heads * each)
        out = qkv.new_empty(rows, self._heads * self._width)
        self._library.attend(
            ctypes.addressof(layer),
            rows,
            at.rows.data_ptr(),
            at.starts.data_ptr(),
            qkv.data_ptr(),
            at.cos.data_ptr(),
            at.sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[1],
            out.data_ptr(),
            self._scratch.data_ptr(),
            each,
            torch.get_num_threads(),
        )
        return out
