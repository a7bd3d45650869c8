"""Give the memory of weights back that are mapped from a file and not needed now.

A base that was loaded from safetensors is mapped, not read: its pages can be dropped at no risk, because
the kernel reads them again from the file when somebody touches them. Pages that were written to (a merged
weight) are never dropped: `MADV_PAGEOUT` keeps what differs from the file.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

MADV_PAGEOUT = 21  # Linux 5.4


def give_back(tensors: Sequence[Tensor]) -> None:
    """Ask the kernel to drop the pages that these tensors alone lie on, where they come from a file."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a wish; nothing depends on it
        ranges = _file_ranges()
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end in filter(None, (_pages(t) for t in tensors)):
            number = bisect.bisect(ranges, (start, sys.maxsize)) - 1
            if number >= 0 and end <= ranges[number][1]:
                advise(start, end - start, MADV_PAGEOUT)


def _pages(tensor: Tensor) -> tuple[int, int] | None:
    """The whole pages inside a tensor's memory."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    size = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // size) * size
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // size * size
    return (start, end) if end > start else None


def _file_ranges() -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped from files, in order."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            start, end = (int(part, 16) for part in addresses.split("-"))
            found.append((start, end))
    return sorted(found)
