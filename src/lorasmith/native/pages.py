"""Memory that is a file's pages: which is, and giving it back to the machine until it is read again."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

DONT_NEED = 4  # MADV_DONTNEED of madvise(2)

Range = tuple[int, int]


def mapped_files(suffix: str = ".safetensors") -> list[Range]:
    """Addresses (first, past the last) where files of this name are mapped; none where the system is not Linux."""
    table = Path("/proc/self/maps")
    if sys.platform != "linux" or not table.is_file():
        return []
    lines = (line.split(maxsplit=5) for line in table.read_text().splitlines())
    ranges = [line[0].split("-") for line in lines if len(line) == 6 and line[5].endswith(suffix)]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


def is_mapped(address: int, size: int, within: Sequence[Range]) -> bool:
    """Whether `size` bytes from `address` lie in one of these ranges."""
    return any(low <= address and address + size <= high for low, high in within)


def forget_pages(address: int, size: int) -> None:
    """Let the pages that lie whole in `size` bytes from `address` leave this process.

    For memory that is mapped from a file and was never written: it is read from there when it is used
    next. Any other memory would lose what it holds (see `is_mapped`).
    """
    first, last = (
        -(-address // mmap.PAGESIZE) * mmap.PAGESIZE,
        (address + size) // mmap.PAGESIZE * mmap.PAGESIZE,
    )
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED)
