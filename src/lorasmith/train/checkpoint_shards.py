"""Tensors of a checkpoint that lie in parts: each process writes its own (`torch.distributed.checkpoint`).

The files are safetensors, `shard-0000K-model-….safetensors` from process K, never the pickle that PyTorch's writer
makes unless asked otherwise. There are several of each process, for the writer has a file's content in memory. Each
notes where its parts belong, so any number of processes reads them, and one alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasmith.errors import OutputError
from lorasmith.train.shard import local

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

PATTERN = "shard-*.safetensors"
FILE_BYTES = 64 * 2**20


def in_shards(folder: Path) -> bool:
    """Whether the checkpoint `folder` was written in parts."""
    return any(folder.glob(PATTERN))


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors`, every process its parts; those that are whole are equal everywhere and written once.

    Raises:
        OutputError: in every process, if one of them could not write; in the first, if others wrote elsewhere.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    ends = accumulate(local(tensor).nbytes for tensor in tensors.values())
    files = {name: 1 + end // FILE_BYTES for name, end in zip(tensors, ends, strict=True)}
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise OutputError(_first(error)) from error


def require_all(folder: Path) -> None:
    """Refuse a checkpoint that lacks the file of a process.

    Raises:
        OutputError: naming what is not there.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    lacking = _lacking(HuggingFaceStorageReader(str(folder)).read_metadata())
    if lacking:
        raise OutputError(
            f"parts of {len(lacking)} tensors are not there, of {lacking[0]} for one: is the output folder the same "
            "in every process?"
        )


@torch.no_grad()
def load_shards(folder: Path, room: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill those tensors of `room` that a checkpoint has, written in parts or not; returns them.

    Raises:
        ValueError: one has another shape, lacks a part, or cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    try:
        metadata = reader.read_metadata()
        if lacking := _lacking(metadata):
            raise ValueError(f"parts of {len(lacking)} tensors are not there, of {lacking[0]} for one")
        found = {n: tensor for n, tensor in room.items() if n in metadata.state_dict_metadata}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(found, storage_reader=reader, no_dist=True)  # all read the same files, each for itself
    except (KeyError, AssertionError, CheckpointException) as error:
        raise ValueError(_first(error)) from error
    return found


def _lacking(metadata: Metadata) -> list[str]:
    """Tensors of which some part is missing: the reader would leave what was in memory there."""
    return [
        name
        for name, tensor in metadata.state_dict_metadata.items()
        if sum(math.prod(chunk.sizes) for chunk in getattr(tensor, "chunks", ()))
        != math.prod(getattr(tensor, "size", ()))
    ]


def _first(error: BaseException) -> str:
    """What went wrong, of an exception of many processes that has a traceback of each."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    return f"{type(inner).__name__}: {inner}"
