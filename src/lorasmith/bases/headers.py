"""Read safetensors headers, and only them: names, dtypes, shapes and byte ranges in milliseconds."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import BaseNotFoundError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The bound that the safetensors reference implementation uses.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says about one tensor; `begin` and `end` count from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def read_headers(directory: str | Path) -> dict[str, TensorHeader]:
    """Return the header of every tensor of a model directory, all shards together, sorted by name.

    Where embeddings are tied, the file holds no `lm_head.weight`, so it's not here either.

    Raises:
        BaseNotFoundError: A file is missing, truncated, or no safetensors file.
    """
    found: dict[str, TensorHeader] = {}
    for path in weight_files(Path(directory)):
        found |= read_file_headers(path)
    return dict(sorted(found.items()))


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that transformers would load: the index's shards, else the single file."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.is_file():
        raise BaseNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}.{_found_instead(directory)}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseNotFoundError(f"{index} is damaged: {error!r}. Copy the model directory again.") from error
    _check_shards(index, names)
    return [directory / name for name in names]


def read_file_headers(path: Path) -> dict[str, TensorHeader]:
    """Return the headers of one file, after checking that its size is the one that they add up to."""
    try:
        with path.open("rb") as file:
            header_bytes = struct.unpack("<Q", file.read(8))[0]
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError(f"the header claims {header_bytes} bytes")
            header = json.loads(file.read(header_bytes))
        start = 8 + header_bytes
        headers = {k: _tensor_header(v, path, start) for k, v in header.items() if k != "__metadata__"}
        _check_size(path, max((h.end for h in headers.values()), default=start))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BaseNotFoundError(
            f"{path} is truncated or damaged: {error}.\n  copy or download that file again."
        ) from error
    return headers


def _tensor_header(entry: dict[str, Any], path: Path, start: int) -> TensorHeader:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"a tensor claims the bytes {begin} to {end}")
    return TensorHeader(str(entry["dtype"]), tuple(entry["shape"]), path, start + begin, start + end)


def _check_size(path: Path, wanted: int) -> None:
    found = path.stat().st_size
    if found != wanted:
        raise ValueError(f"its header describes {wanted} bytes, the file has {found}")


def _check_shards(index: Path, names: list[str]) -> None:
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise BaseNotFoundError(f"{index} names files outside its own folder: {', '.join(outside)}.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise BaseNotFoundError(f"{index.parent} lacks {', '.join(missing)}, which {INDEX} names.")


def _found_instead(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return "\n  it looks like an adapter; give its base here, and the adapter where one is asked for."
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(
        p.name for p in directory.glob("*.pt*")
    )
    if pickles:
        return (
            f"\n  it holds {', '.join(pickles[:3])}: pickle files can run code when they are read, so they"
            " never are.\n  convert them once with save_pretrained(…, safe_serialization=True)."
        )
    return "\n  weights are read from safetensors only."
