"""OpenMP's workers: ended when a thread asks for it, and started again by its next parallel work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasmith.native import release_threads

COUNT = """
import threading, torch
from pathlib import Path
from lorasmith.native import release_threads

torch.set_num_threads(2)
x = torch.ones(1 << 20)
release_threads()

def threads():
    return len(list(Path("/proc/self/task").iterdir()))

def compute():
    x.exp()
    counts.append(threads())

counts = [threads()]
compute()
release_threads()
counts.append(threads())
compute()
release_threads()
other = threading.Thread(target=lambda: (compute(), release_threads(), counts.append(threads())))
other.start()
other.join()
print(*(count - counts[0] for count in counts))
"""


def has_libgomp() -> bool:
    return any((Path(torch.__file__).parent / "lib").glob("libgomp*")) and Path("/proc/self/task").is_dir()


@pytest.mark.skipif(not has_libgomp(), reason="torch runs on another OpenMP")
def test_workers_end_and_come_back():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    # before, with a worker, without, with it again; in another thread (one more): with a worker, without
    assert done.stdout.split() == ["0", "1", "0", "1", "2", "1"]


def test_it_changes_no_result_and_can_be_asked_twice():
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    before = x @ x
    release_threads()
    release_threads()
    assert torch.equal(x @ x, before)
