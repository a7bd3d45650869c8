"""Put a loaded model's linear layers into few bits, without ever holding it whole in the computing dtype."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.quantised import quantise_linears

DONT_NEED = 4  # madvise(2), Linux


def quantise_base(model: Any, kind: str, dtype: torch.dtype) -> str:
    """Quantise `model` in place and bring the rest to `dtype`; returns a line that says what was done.

    Args:
        model: in the dtype of its files, whose pages its weights are.

    Raises:
        ConfigError: it has no layer to quantise.
    """
    stored = model.dtype
    mapped = _mapped_ranges()
    found = quantise_linears(model, kind, dtype=dtype, then=lambda weight: _forget(weight, mapped))
    for parameter in model.parameters():
        if parameter.dtype == stored:  # what a model keeps wider on purpose stays so
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # only glibc can give freed memory back
            ctypes.CDLL(None).malloc_trim(0)
    bits = 8 * found.stored_bytes / found.params
    return f"{kind}: {found.layers} linear layers of {found.params:,} weights at {bits:.3f} bits"


def _forget(weight: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Give the pages of a weight that was read from its file back; they can be read again."""
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    if any(low <= start and end <= high for low, high in mapped):
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED)


def _mapped_ranges() -> list[tuple[int, int]]:
    """Addresses where safetensors files are mapped into this process; none where the system is not Linux."""
    table = Path("/proc/self/maps")
    if sys.platform != "linux" or not table.is_file():
        return []
    lines = (line.split(maxsplit=5) for line in table.read_text().splitlines())
    ranges = [line[0].split("-") for line in lines if len(line) == 6 and line[5].endswith(".safetensors")]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]
