"""One pass over many tensors on all cores: each job runs on one thread, so its bits never depend on how many."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch
from torch import Tensor

Job = Callable[[Tensor], object]
SCRATCH_ELEMENTS = 1 << 20
"""Of the float32 scratch that each job gets: 4 MiB, which stays in the cache from job to job."""

_starting = threading.Lock()


def run_jobs(jobs: Iterable[Job], *, inline: bool = False) -> None:
    """Call every job once with a float32 CPU scratch of `SCRATCH_ELEMENTS`, on as many threads as torch uses.

    Returns or raises only when no job runs any more; after an exception the rest is not started.

    Args:
        inline: run them here, one after another, as work on a GPU should be: its streams belong to a thread.
    """
    todo, threads = deque(jobs), torch.get_num_threads()
    if inline or threads == 1:
        _drain(todo)
        return
    futures = [_workers(threads, os.getpid()).submit(_drain, todo) for _ in range(min(threads, len(todo)))]
    try:
        for future in futures:
            future.result()
    finally:
        todo.clear()
        wait(futures)


@torch.no_grad()
def _drain(todo: deque[Job]) -> None:
    scratch = torch.empty(SCRATCH_ELEMENTS, dtype=torch.float32, device="cpu")
    try:
        while True:
            try:
                job = todo.popleft()
            except IndexError:
                return
            job(scratch)
    except BaseException:
        todo.clear()
        raise


def _workers(count: int, process: int) -> ThreadPoolExecutor:
    with _starting:
        return _start_workers(count, process)


@cache
def _start_workers(count: int, process: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each. `process`: a fork inherits the cache but not the threads."""
    ready = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first use of torch sets the process's number, so not later
        torch.set_num_threads(1)  # of this thread, and of threads that have not used torch yet …
        ready.wait()

    pool = ThreadPoolExecutor(count, "lorasmith-write", initializer=start)
    for _ in range(count):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(count)  # … so that is put back
    return pool
