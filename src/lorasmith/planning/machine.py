"""What there is to spend: memory that may really be used, and the speed of matrix products."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lorasmith.errors import ConfigError, did_you_mean

GIB = 2**30
CUDA_CONTEXT_BYTES = 600 * 2**20
"""A CUDA process before its first tensor: context, cuBLAS and cuDNN handles; a round figure of drivers 5xx."""

SHARE_OF_PEAK = 0.4
"""Of a GPU's printed peak that training usually reaches; an assumption, and printed as one."""


@dataclass(frozen=True)
class Machine:
    """Where a run would take place.

    Attributes:
        memory_bytes: that the run may use.
        flops: matrix products per second that training can count on, in the base's dtype.
        bytes_per_s: of memory traffic.
        note: where the figures come from.
    """

    name: str
    memory_bytes: int
    flops: float
    bytes_per_s: float
    note: str
    is_cuda: bool = False


DEVICES: dict[str, tuple[float, float, float]] = {
    # GiB, dense bf16 TFLOP/s (fp16 where there is no bf16), GB/s: the makers' data sheets
    "T4": (15, 65, 320),
    "V100-32GB": (32, 125, 900),
    "RTX3060-12GB": (12, 51, 360),
    "RTX3090": (24, 71, 936),
    "RTX4090": (24, 165, 1008),
    "RTX5090": (32, 209, 1792),
    "L4": (22, 121, 300),
    "A10G": (22, 70, 600),
    "L40S": (45, 362, 864),
    "A100-40GB": (40, 312, 1555),
    "A100-80GB": (80, 312, 2039),
    "H100": (80, 989, 3350),
    "H200": (141, 989, 4800),
    "B200": (180, 2250, 8000),
    "MI300X": (192, 1307, 5300),
}


def known_device(name: str) -> Machine:
    """A well-known GPU by name.

    Raises:
        ConfigError: the table has no such device; the names there are listed.
    """
    found = {key.lower(): key for key in DEVICES}.get(name.lower())
    if found is None:
        raise ConfigError(
            f'No device "{name}" is in the table.{did_you_mean(name, DEVICES)}\n  known: {", ".join(DEVICES)}'
        )
    memory, tflops, bandwidth = DEVICES[found]
    note = f"data sheet: {tflops:g} TFLOP/s in bf16, of which {SHARE_OF_PEAK:.0%} are assumed"
    return Machine(
        found, int(memory * GIB), tflops * 1e12 * SHARE_OF_PEAK, bandwidth * 1e9, note, is_cuda=True
    )


def this_machine(dtype: torch.dtype | None, *, processes: int = 1) -> Machine:
    """The CPU here: memory under every limit, and rates measured in half a second.

    What this process holds already counts as free, since the run takes it over.

    Args:
        dtype: of the products; None measures nothing, where only memory matters.
        processes: that share it; what is free is divided among them.
    """
    memory, why = usable_memory()
    name, memory = "this machine", memory // processes + resident_bytes(anonymous=True)
    if dtype is None:
        return Machine(name, memory, math.inf, math.inf, f"memory: {why}")
    rate, traffic = matmul_rate(dtype), copy_rate()
    note = f"measured {rate / 1e9:,.0f} GFLOP/s and {traffic / 1e9:.0f} GB/s with {torch.get_num_threads()} threads"
    return Machine(name, memory, rate, traffic, f"{note}; memory: {why}")


def usable_memory() -> tuple[int, str]:
    """Bytes that a process may still take, and which limit says so: the machine's or a container's."""
    free = psutil.virtual_memory().available
    found = [(free, "available on the machine")]
    found += [
        (max(0, limit - used), f"left under the cgroup limit of {limit / GIB:.1f} GiB")
        for limit, used in cgroup_limits()
    ]
    return min(found)


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), table: Path | None = None) -> list[tuple[int, int]]:
    """(limit, used) of every cgroup that this process is in, version 1 or 2, from its own group upwards.

    Used memory excludes cached files, which the kernel gives back.
    """
    try:
        lines = (table or Path("/proc/self/cgroup")).read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, used, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit = root / "memory", "memory.limit_in_bytes"
            used, cached = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = folder / path.lstrip("/")
        for place in (group, *group.parents):
            pair = _limit_of(place, limit, used, cached)
            if pair is not None:
                found.append(pair)
            if place == folder:
                break
    return found


def _limit_of(place: Path, limit: str, used: str, cached: str) -> tuple[int, int] | None:
    try:
        most, now = int((place / limit).read_text()), int((place / used).read_text())
        stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # absent, or "max"
        return None
    if most >= 1 << 60:  # version 1 writes a huge number where there is no limit
        return None
    return most, max(0, now - int(stat.get(cached, 0)))


def matmul_rate(dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """FLOP/s of products of the shape that training makes: (512, 1024) @ (1024, 1024), best of several."""
    x, W = (torch.ones(rows, 1024, dtype=dtype) for rows in (512, 1024))
    work = 2 * 512 * 1024 * 1024
    return work / _best_time(lambda: torch.mm(x, W), seconds)


def copy_rate(*, seconds: float = 0.1) -> float:
    """Bytes read and written per second by copying 64 MB."""
    source = torch.zeros(16 * 2**20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_time(lambda: target.copy_(source), seconds)


def _best_time(work: Callable[[], object], seconds: float) -> float:
    work()
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def resident_bytes(*, anonymous: bool = False) -> int:
    """Memory that this process holds now; `anonymous` leaves out what is only mapped from files."""
    info = psutil.Process(os.getpid()).memory_info()
    return int(info.rss - (getattr(info, "shared", 0) if anonymous else 0))


def trim_heap() -> None:
    """Give what is free in the C library's heap back to the machine; only glibc can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
