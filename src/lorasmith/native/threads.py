"""OpenMP's idle workers: each thread that ever computed in parallel has its own, and they slow each other down."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

OMP_PAUSE_SOFT = 1


def release_threads() -> None:
    """End the OpenMP workers that wait for this thread; its next parallel work starts new ones (0.1 ms).

    libgomp counts all workers of a process. Where they outnumber the cores, no barrier spins any more, and each
    costs a system call: decoding one row on two cores then takes more than twice the time (dev/LOG.md). So a thread
    that has computed, and will not for a while, lets its workers go. Does nothing where torch has another OpenMP.
    """
    _pause()(OMP_PAUSE_SOFT)


@cache
def _pause() -> Callable[[int], object]:
    import torch

    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            function: Callable[[int], object] = library.omp_pause_resource_all  # since GCC 9
        except (OSError, AttributeError):  # not the one that torch runs on, or an older one
            continue
        return function
    return lambda kind: None
