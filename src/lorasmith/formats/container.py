"""The safetensors container, read from its header: where each tensor lies, checked before allocation.

Layout: 8 bytes little-endian N, N bytes of JSON (name → dtype, shape, [begin, end)), then the data,
which the tensors must tile exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.errors import AdapterFileError
from lorasmith.formats.strict_json import parse_object

MAX_FAULTS_SHOWN = 20
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor in the file; `begin` and `end` count bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_slots(path: Path, faults: list[str]) -> dict[str, Slot]:
    """Name → `Slot` for every sound entry. What is wrong with the others, or the file, goes to `faults`."""
    file_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            start, entries = _read_entries(file, file_bytes)
    except ValueError as error:
        faults.append(f"{path.name}: {error}")
        return {}
    entries.pop("__metadata__", None)
    slots: dict[str, Slot] = {}
    for name, entry in entries.items():
        try:
            slots[name] = _slot(entry, start)
        except ValueError as error:
            faults.append(f"{path.name}: {name!r} {error}")
    if len(slots) == len(entries):
        faults += [f"{path.name}: {fault}" for fault in _layout_faults(slots, start, file_bytes)]
    return slots


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file `path`, by name.

    Raises:
        AdapterFileError: it cannot be read, or is not sound from end to end.
    """
    faults: list[str] = []
    try:
        slots = read_slots(path, faults)
        if not faults:
            with path.open("rb") as file:
                return {name: read_tensor(file, slot) for name, slot in slots.items()}
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror or error}")
    raise AdapterFileError("\n  ".join([f"{path.parent} cannot be read.", *faults[:MAX_FAULTS_SHOWN]]))


def read_tensor(file: BufferedReader, slot: Slot) -> Tensor:
    """Read one tensor into memory of its own."""
    tensor = torch.empty(slot.shape, dtype=slot.dtype)
    file.seek(slot.begin)
    if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != slot.end - slot.begin:
        raise AdapterFileError(f"{file.name} became shorter while it was read; nothing was loaded.")
    return tensor


def _read_entries(file: BufferedReader, file_bytes: int) -> tuple[int, dict[str, Any]]:
    first = file.read(8)
    header_bytes = int.from_bytes(first, "little")
    # a sound header may have a length whose first bytes look like a pickle's, so fit comes first
    if 8 + header_bytes > file_bytes and first.startswith(_PICKLE_STARTS):
        raise ValueError(
            "this is a pickle under another name, and opening one runs the code inside. Convert it "
            "where it was made: load it there and save it again with safe_serialization=True"
        )
    if len(first) < 8:
        raise ValueError(f"the file is {file_bytes} bytes long, too short for a safetensors file")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(
            f"the header claims {header_bytes:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
        )
    if 8 + header_bytes > file_bytes:
        raise ValueError(f"truncated: the header claims {header_bytes:,} bytes, the file has {file_bytes:,}")
    try:
        return 8 + header_bytes, parse_object(file.read(header_bytes))
    except ValueError as error:
        raise ValueError(f"the header cannot be parsed: {error}") from None


def _slot(entry: object, start: int) -> Slot:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("needs exactly dtype, shape and data_offsets")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(
            f"has shape {shape!r:.80} and data_offsets {offsets!r:.80}; whole numbers are needed"
        )
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"has dtype {name!r:.20}; factors are one of {', '.join(DTYPES)}")
    needed, given = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != given:
        raise ValueError(f"of shape {shape!r:.80} and dtype {name} needs {needed} bytes and has {given}")
    return Slot(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(values: object) -> bool:
    # 2**40 elements along one axis is beyond any adapter; it keeps the products small
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(v) is int and 0 <= v < 2**40 for v in values)
    )


def _layout_faults(slots: dict[str, Slot], start: int, file_bytes: int) -> Iterable[str]:
    expected = start
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)):
        if slot.begin != expected:
            kind = "overlaps the tensor before it" if slot.begin < expected else "leaves a gap before it"
            yield f"{name!r} {kind} (it starts at byte {slot.begin}, expected {expected})"
        expected = max(expected, slot.end)
    if expected > file_bytes:
        yield f"truncated: the tensors end at byte {expected}, the file at {file_bytes}"
    elif expected < file_bytes:
        yield f"{file_bytes - expected} bytes after the last tensor belong to nothing"
