"""Adapters that no server should serve, each made from a good one by one fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Spoil = Callable[[Path], object]


def write_bad(good: Path, folder: Path) -> dict[str, Path]:
    """One directory for each fault; fault → directory."""
    made = {}
    for kind, spoil in _FAULTS.items():
        path = folder / kind.replace(" ", "-")
        path.mkdir(parents=True)
        for name in (CONFIG, WEIGHTS):
            shutil.copy(good / name, path / name)
        spoil(path)
        made[kind] = path
    return made


def _tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Spoil:
    def spoil(path: Path) -> None:
        save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS, metadata={"format": "pt"})

    return spoil


def _bytes(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(path: Path) -> None:
        (path / WEIGHTS).write_bytes(change((path / WEIGHTS).read_bytes()))

    return spoil


def _config(**settings: object) -> Spoil:
    def spoil(path: Path) -> None:
        values = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(values | settings))

    return spoil


def _without(name: str) -> Spoil:
    return lambda path: (path / name).unlink()


def _one_value(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        next(t for n, t in tensors.items() if "lora_B" in n).view(-1)[0] = value
        return tensors

    return change


def _wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.cat([t, t[:, :1]], 1) if "lora_A" in n else t for n, t in tensors.items()}


def _half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if "lora_A" in n}


def _elsewhere(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace(".self_attn.", ".no_such_block."): t for n, t in tensors.items()}


_FAULTS: dict[str, Spoil] = {
    "truncated weights": _bytes(lambda raw: raw[: len(raw) // 2]),
    "random bytes as weights": _bytes(lambda raw: bytes((i * 37 + 11) % 256 for i in range(4096))),
    "a header of 2^60 bytes": _bytes(lambda raw: (1 << 60).to_bytes(8, "little") + raw[8:]),
    "empty weights": _bytes(lambda raw: b""),
    "a NaN": _tensors(_one_value(float("nan"))),
    "an infinity": _tensors(_one_value(float("inf"))),
    "A of the wrong width": _tensors(_wider),
    "A without B": _tensors(_half),
    "modules that the base has not": _tensors(_elsewhere),
    "a rank of 100 million": _config(r=100_000_000),
    "a config that is no JSON": lambda path: (path / CONFIG).write_text("{"),
    "no config": _without(CONFIG),
    "no weights": _without(WEIGHTS),
}
