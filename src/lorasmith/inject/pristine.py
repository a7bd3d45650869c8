"""Where the base's own bits are kept while an adapter is merged: its file, or a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from lorasmith.errors import MergeStateError
from lorasmith.inject.parallel import run_jobs
from lorasmith.lora import FileSource

Keep = Literal["auto", "file", "cpu", "device"]


@torch.no_grad()
def keep_pristine(live: Mapping[str, Tensor], keep: Keep, source: FileSource | None) -> dict[str, Tensor]:
    """The bits of every tensor of `live`, independent of it.

    Args:
        live: parameter name → its tensor, pristine now.
        source: the files that the model came from, where known.

    Raises:
        MergeStateError: `keep="file"`, and a tensor has no equal in the files.
    """
    on_file = _matching_file_tensors(live, source) if source and keep in ("auto", "file") else {}
    if keep == "file" and on_file.keys() != live.keys():
        raise MergeStateError(
            f'merge: keep="file", but {len(live.keys() - on_file.keys())} weights have no equal tensor in the '
            'file that the model came from. Use keep="cpu" or keep="device".'
        )
    return {
        name: on_file[name]
        if name in on_file
        else (tensor.clone() if keep == "device" else tensor.to("cpu", copy=True))
        for name, tensor in live.items()
    }


def _matching_file_tensors(live: Mapping[str, Tensor], source: FileSource) -> dict[str, Tensor]:
    """Memory-mapped tensors of the base's files that equal the live ones bit for bit."""
    found: dict[str, Tensor] = {}
    by_file: dict[str, list[tuple[str, str]]] = {}
    for name in live:
        if name in source.tensors:
            file, key = source.tensors[name]
            by_file.setdefault(str(file), []).append((name, key))
    stored = {name: tensor for path, entries in by_file.items() for name, tensor in _mapped(path, entries)}
    run_jobs([partial(_note_if_equal, name, live[name], stored[name], found) for name in stored])
    return found


def _mapped(path: str, entries: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as tensors:
        for name, key in entries:
            yield name, tensors.get_tensor(key)


def _note_if_equal(
    name: str, live: Tensor, stored: Tensor, found: dict[str, Tensor], scratch: Tensor | None = None
) -> None:
    if stored.dtype == live.dtype and stored.shape == live.shape and torch.equal(*map(_raw, (live, stored))):
        found[name] = stored


def _raw(tensor: Tensor) -> Tensor:
    """The bits as whole numbers: -0 is not 0 here, and NaN is NaN."""
    flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
    return flat.view(torch.int64) if flat.numel() % 8 == 0 else flat
