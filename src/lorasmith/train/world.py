"""The processes that train together under `torchrun`, or this one alone.

A world of one process answers every question without asking anybody, so callers need no second path.
Gradients are summed in float32 at least, in an order that depends on nothing but the number of processes:
the same run gives the same bits again, and every process the same ones.
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorasmith.errors import ConfigError, TrainingError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and whoever starts processes in its way, puts into the environment."""
LOST = ("gloo", "Gloo", "NCCL", "onnection closed", "onnection reset")
"""What the messages of a broken process group have in common."""
BUCKET_BYTES = 32 * 2**20
SETTLING_S = 0.1
PATIENCE = timedelta(hours=24)
"""A process that died is noticed at once by its closed connection; one that merely computes is waited for."""


@dataclass(frozen=True)
class World:
    """Who trains.

    Attributes:
        rank: number of this process, from 0. size: how many there are.
        local_rank: number on this machine. local_size: how many share it.
        board: a table of keys that all see; torchrun's own outlives a restart of its processes.
        is_sharded: the base is spread over them, so all must make the same passes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    board: Any = None
    is_sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes: its own GPU, if there is one for each."""
        return device_of(self.local_rank, self.local_size)

    @property
    def lines(self) -> tuple[str, ...]:
        """What a run says of its processes."""
        if self.size == 1:
            return ()
        where = "gloo" if self.device.type == "cpu" else "NCCL"
        threads = ""
        if self.device.type == "cpu":
            count = torch.get_num_threads()
            threads = f", {count} thread{'s' if count > 1 else ''} each"
            threads += " (torchrun's default; OMP_NUM_THREADS sets it)" if count == 1 else ""
        return (f"processes: {self.size} through {where}{threads}",)

    def reduce_(self, parameters: Iterable[nn.Parameter], *values: float) -> list[float]:
        """Sum gradients over all processes in place; returns the sums of `values` (in float64).

        A gradient that no process has stays None; one that some lack counts as zero there.
        """
        if self.size == 1:
            return list(values)
        parameters = list(parameters)
        owned = [float(p.grad is not None) for p in parameters]
        found = self.total(*values, *owned)
        present = [p for p, count in zip(parameters, found[len(values) :], strict=True) if count]
        for bucket in _buckets(present):
            self._sum_bucket(bucket)
        return found[: len(values)]

    def _sum_bucket(self, parameters: Sequence[nn.Parameter]) -> None:
        wide = torch.promote_types(parameters[0].dtype, torch.float32)
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=wide, device=parameters[0].device)
        parts = torch.split(flat, [p.numel() for p in parameters])
        for part, p in zip(parts, parameters, strict=True):
            if p.grad is not None:
                part.copy_(p.grad.flatten())
        dist.all_reduce(flat)
        for part, p in zip(parts, parameters, strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(part.view(p.shape))

    def total(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return [float(v) for v in summed.tolist()]

    def any(self, value: bool) -> bool:
        """Whether it is true in some process."""
        return bool(self.total(float(value))[0])

    def most(self, value: int) -> int:
        """The largest value of any process."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def gather_rows(self, rows: Tensor, shape: torch.Size) -> Tensor | None:
        """A tensor of `shape` whose rows are dealt out in equal chunks, the last ones shorter; in the first process."""
        chunk = -(-shape[0] // self.size)
        padded = rows.new_zeros(chunk, *shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in range(self.size)] if self.is_first else None
        dist.gather(padded, found)
        return None if found is None else torch.cat([part.cpu() for part in found])[: shape[0]]

    def of_first(self, value: Any) -> Any:
        """The first process's value."""
        return self.gather(value)[0]

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse to train together on different things, such as a data file that differs between machines.

        Raises:
            ConfigError: in every process, naming what differs.
        """
        everyone = self.gather(dict(facts))
        lines = [
            f"{key}: {everyone[0][key]!r} in process 0, {other.get(key)!r} in process {rank}"
            for rank, other in enumerate(everyone)
            for key in everyone[0]
            if other.get(key) != everyone[0][key]
        ]
        if lines:
            raise ConfigError(
                "The processes of this run do not see the same:\n  " + "\n  ".join(lines)
                + "\n  Give each the same files, settings and versions."
            )  # fmt: skip

    def require_equal(self, parameters: Iterable[Tensor]) -> None:
        """Refuse to go on when what trains is no longer the same in every process.

        Raises:
            TrainingError: in every process.
        """
        if self.size == 1:
            return
        sums = self.gather([_checksum(p) for p in parameters])
        if any(other != sums[0] for other in sums):
            apart = [rank for rank, other in enumerate(sums) if other != sums[0]]
            raise TrainingError(
                f"What trains in processes {apart} is not what trains in process 0. They add up the same gradients, "
                "so one of these machines computes wrongly, or their versions of torch differ. The last checkpoint "
                "is from before that."
            )

    def seed(self, seed: int, step: int) -> None:
        """Set torch's random state for one step; nothing is done alone, where the state goes on by itself."""
        if self.size > 1:
            digest = hashlib.sha256(f"{seed}/{step}/{self.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "little"))

    def has_begun(self, folder: Path) -> bool:
        """Whether this very launch wrote into `folder` before torchrun started its processes again."""
        return self.board is not None and bool(self.board.check([_begun(folder)]))

    def note_begun(self, folder: Path) -> None:
        """Let a restart of this launch know that the run in `folder` is its own."""
        if self.board is not None and self.is_first:
            self.board.set(_begun(folder), "yes")


ALONE = World()


def is_launched() -> bool:
    """Whether torchrun, or something that speaks its way, started this process."""
    return all(name in os.environ for name in NEEDED)


def device_of(local_rank: int, local_size: int) -> torch.device:
    """The GPU of a process, where this machine has one for each; else the CPU."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_size:
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


@contextmanager
def world() -> Iterator[World]:
    """The world of this process; under torchrun its process group is there inside the `with`.

    Raises:
        ConfigError: the environment names a world that cannot be joined.
    """
    if not is_launched():
        yield ALONE
        return
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_RANK", "0"),
            ("LOCAL_WORLD_SIZE", "1"),
        )
    )
    here = World(rank, size, local_rank, local_size)
    starts = size > 1 and not dist.is_initialized()
    if starts:
        _start(here)
    try:
        yield replace(here, board=_board() if size > 1 or _has_agent() else None)
    finally:
        if starts:
            _end()


@contextmanager
def partners() -> Iterator[None]:
    """What a lost partner looks like to the others, whichever call meets it first, in words."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(word in text for word in LOST):
            raise
        raise TrainingError(
            "Another process of this run ended, so the others cannot go on; its own message, or torchrun's "
            "report, says why. Checkpoints are intact: torchrun --max-restarts goes on by itself, --resume by hand."
        ) from error


def _start(here: World) -> None:
    import torch.distributed.nn.functional  # before the group: its functions keep one as their default (see _end)

    if here.device.type == "cuda":
        torch.cuda.set_device(here.device)
    try:
        backend = "gloo" if here.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        meeting = (
            {"store": _meeting(here), "rank": here.rank, "world_size": here.size} if _has_agent() else {}
        )
        dist.init_process_group(backend, timeout=PATIENCE, **meeting)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The {here.size} processes of this run could not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from error


def _end() -> None:
    """Let go of the process group everywhere, so that its threads end here.

    Threads that outlive this hold the last tensors, and abort the interpreter if they free them while it ends
    (dev/LOG.md). torch's own record of how it placed sharded tensors holds the group too. So does a sharded base
    that the caller has; then at least those tensors shall be free before anything else happens.
    """
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        debug._clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    gc.collect()
    if group() is not None:
        time.sleep(SETTLING_S)


def _meeting(here: World) -> Any:
    """A part of torchrun's table for this start alone.

    torch 2.13 keeps one table for all starts of a launch and its own set-up looks in it for what the processes
    of this start wrote: it finds addresses of those that died, and waits for them for ever (dev/LOG.md).
    """
    table = _board()
    start = f"lorasmith/start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{here.size}"
    again = int(table.add(f"{start}/{here.rank}", 1))  # without a failure too: machines come and go
    return dist.PrefixStore(f"{start}/{again}", table)  # type: ignore[attr-defined]


def _has_agent() -> bool:
    """Whether torchrun keeps the table of keys; else the first process does, and it goes with it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _board() -> Any:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=False, timeout=timedelta(seconds=30)
    )


def is_first_to_say(text: str) -> bool:
    """Whether no other process of this launch has said this yet: one message, not one from each process."""
    if not (is_launched() and _has_agent()):
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"lorasmith/said/{attempt}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        return int(_board().add(key, 1)) == 1
    except RuntimeError:  # rather twice than never
        return True


def wait_for(store: Any, keys: Sequence[str], stop: Callable[[], bool]) -> bool:
    """Wait until every key is set; False if `stop` became true before."""
    while not store.check(list(keys)):
        if stop():
            return False
        time.sleep(0.05)
    return True


def _begun(folder: Path) -> str:
    return f"lorasmith/begun/{folder.resolve()}"


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, of one dtype and about `BUCKET_BYTES` at a time."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and (p.dtype != bucket[0].dtype or sum(4 * q.numel() for q in bucket) >= BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def _checksum(tensor: Tensor) -> int:
    whole_number = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(whole_number).sum(dtype=torch.int64))
