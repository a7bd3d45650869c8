"""The tensors of a model on disk, one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorasmith.errors import BaseNotFoundError

Loader = Callable[[], Tensor]
Tensors = Mapping[str, Tensor | Loader]

_INDEX = "model.safetensors.index.json"


def open_tensors(directory: str | Path) -> dict[str, Loader]:
    """Tensor name → a function that reads that tensor alone, over all shards in `directory`.

    Only headers are read here. With `model.safetensors.index.json` its map decides, else every
    `*.safetensors` file counts.

    Raises:
        BaseNotFoundError: no readable safetensors there, a shard that the index names is missing or
            damaged, or two files hold the same name.
    """
    root = Path(directory)
    files = _files(root)
    loaders: dict[str, Loader] = {}
    for file, wanted in files.items():
        for name in _names(file) if wanted is None else wanted:
            if name in loaders:
                raise BaseNotFoundError(f"{root}: two files hold {name!r} and there is no {_INDEX} to choose")
            loaders[name] = partial(_read, file, name)
    return loaders


def _files(root: Path) -> dict[Path, list[str] | None]:
    if not (root / _INDEX).is_file():
        found: dict[Path, list[str] | None] = dict.fromkeys(sorted(root.glob("*.safetensors")))
        if not found:
            raise BaseNotFoundError(f"{root}: no *.safetensors; give the directory of a saved model")
        return found
    by_file: dict[Path, list[str] | None] = {}
    for name, shard in _weight_map(root / _INDEX).items():
        names = by_file.setdefault(root / shard, [])
        if names is not None:
            names.append(name)
    for file, names in by_file.items():
        missing = sorted(set(names or []) - set(_names(file)))
        if missing:
            raise BaseNotFoundError(
                f"{file}: the index promises {', '.join(missing[:5])}, which is not there"
            )
    return by_file


def _weight_map(index: Path) -> dict[str, str]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(shard) for name, shard in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseNotFoundError(f"{index}: not a safetensors index ({error!r})") from error
    outside = sorted({shard for shard in entries.values() if Path(shard).name != shard})
    if outside:
        raise BaseNotFoundError(f"{index}: names files outside its directory: {', '.join(outside[:5])}")
    return entries


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (OSError, SafetensorError) as error:
        raise BaseNotFoundError(f"{file}: cannot be read as safetensors ({error})") from error


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
    return tensor


def load(tensors: Tensors, name: str) -> Tensor:
    """The tensor called `name`, read now if it is lazy."""
    value = tensors[name]
    return value if isinstance(value, Tensor) else value()
