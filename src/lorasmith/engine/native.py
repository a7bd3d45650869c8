"""Decode steps in bfloat16 as four small C functions, where a C compiler is there.

At one token per row the work is to read weights and factors from memory, and most of torch's time goes to
calling small operations. The source is compiled once with the machine's own compiler (about a second) and
kept in the cache folder. Without a compiler, with another dtype or device, or with `LORASMITH_NATIVE=0`,
plain torch computes the same (`slots`, `llama`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.bases import home
from lorasmith.engine.native_source import SOURCE

COMPILE_TIMEOUT_S = 60
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC", "-std=gnu11")


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
    if os.environ.get("LORASMITH_NATIVE", "1") == "0":
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    signatures = {
        "add_lora": (pointer, number, pointer, pointer, pointer, number, pointer, number),
        "add_norm": (number, number, pointer, pointer, pointer, real, pointer, number),
        "silu_mul": (number, number, pointer, pointer, number),
        "attend": (pointer, number, *[pointer] * 7, number, pointer, pointer, number, number),
    }
    try:
        found = ctypes.CDLL(str(_compiled()))
        for name, arguments in signatures.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    return found


def _compiled() -> Path:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C compiler")
    said = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_S, check=True)
    cpu = [line for line in _cpu_lines() if line.startswith(("flags", "Features", "model name"))][:2]
    # GCC prefers half the width on most x86, which doubles the time of these loops.
    flags = (*FLAGS, "-mprefer-vector-width=512") if "avx512f" in " ".join(cpu) else FLAGS
    key = repr((SOURCE, flags, said.stdout, platform.machine(), cpu))
    target = home() / "native" / f"lora-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            source, out = Path(scratch) / "lora.c", Path(scratch) / "lora.so"
            source.write_text(SOURCE)
            command = [compiler, *flags, str(source), "-o", str(out)]
            subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S, check=True)
            os.replace(out, target)
    return target


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
