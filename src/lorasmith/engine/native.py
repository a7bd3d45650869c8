"""Decode steps in bfloat16 as four small C functions, where a C compiler is there.

At one token per row the work is to read weights and factors from memory, and most of torch's time goes to
calling small operations. The source is compiled once with the machine's own compiler (about a second) and
kept in the cache folder. Without a compiler, with another dtype or device, or with `LORASMITH_NATIVE=0`,
plain torch computes the same (`slots`, `llama`).
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.bases import home
from lorasmith.engine.native_source import SOURCE
from lorasmith.native import is_enabled, load


class _Group(ctypes.Structure):
    _fields_ = (
        ("inner", ctypes.c_long),
        ("rank", ctypes.c_long),
        ("members", ctypes.c_long),
        ("out", ctypes.c_void_p),
        ("A", ctypes.c_void_p),
        ("B", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
    )


class NativeGroup:
    """Pointers to the stacks of one group; made anew when they are reallocated."""

    def __init__(self, A: Tensor, B: Sequence[Tensor], rank: int, ranks: Tensor) -> None:
        self._kept = (A, list(B), ranks)  # what the pointers point to
        self._out = (ctypes.c_long * len(B))(*(b.shape[2] for b in B))
        self._B = (ctypes.c_void_p * len(B))(*(b.data_ptr() for b in B))
        self._function = library().add_lora
        self._scratch, self._scratch_rows = torch.empty(0), 0
        self._numbers_per_row = len(B) * rank
        self._group = _Group(
            A.shape[2],
            rank,
            len(B),
            ctypes.addressof(self._out),
            A.data_ptr(),
            ctypes.addressof(self._B),
            ranks.data_ptr(),
        )
        self._address = ctypes.addressof(self._group)

    def add(self, y: Tensor, x: Tensor, slots: Tensor) -> None:
        """y[b] += (x[b] @ A[slots[b], i].T) @ B_i[slots[b]] for all members i side by side, in place.

        Args:
            y: (rows, Σ out), bfloat16.
            x: (rows, in), bfloat16.
            slots: (rows), int32; -1 leaves a row alone.
        """
        rows = x.shape[0]
        if rows > self._scratch_rows:
            self._scratch = torch.empty(rows * self._numbers_per_row)
            self._scratch_rows = rows
        x = x.contiguous()
        self._function(
            self._address,
            rows,
            slots.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            y.stride(0),
            self._scratch.data_ptr(),
            torch.get_num_threads(),
        )


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the C function serves stacks of this dtype on this device."""
    return dtype == torch.bfloat16 and device.type == "cpu" and library() is not None


@functools.cache
def library() -> Any:
    """The compiled functions; None where they cannot be had."""
    if not is_enabled():
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    signatures = {
        "add_lora": (pointer, number, pointer, pointer, pointer, number, pointer, number),
        "add_norm": (number, number, pointer, pointer, pointer, real, pointer, number),
        "silu_mul": (number, number, pointer, pointer, number),
        "attend": (pointer, number, *[pointer] * 7, number, pointer, pointer, number, number),
    }
    try:
        return load(SOURCE, signatures, folder=home() / "native")
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
