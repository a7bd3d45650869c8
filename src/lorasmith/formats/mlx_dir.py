"""MLX-LM's adapter directory, written and read.

`adapters.safetensors` holds `<path>.lora_a` (in, rank) and `<path>.lora_b` (rank, out); the layer computes
y + scale · (x @ lora_a) @ lora_b, so A = lora_aᵀ, B = lora_bᵀ. `adapter_config.json` knows one rank and one
scale for all layers; `keys` are paths inside a layer, or whole paths outside the layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.errors import AdapterFileError, OutputError
from lorasmith.formats import sidecar
from lorasmith.formats.container import Slot, read_slots, read_tensor
from lorasmith.formats.header import refuse
from lorasmith.formats.portable import fold_scaling, pad_ranks, require_plain
from lorasmith.formats.publish import publish_directory
from lorasmith.formats.strict_json import parse_object
from lorasmith.lora import Adapter, Factors, LoRAConfig

MLX_WEIGHTS_NAME = "adapters.safetensors"
MLX_CONFIG_NAME = "adapter_config.json"
MLX_FILE_NAMES = (MLX_WEIGHTS_NAME, MLX_CONFIG_NAME, sidecar.FILE_NAME)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FACTOR = re.compile(r"((?:[^\s./\\\x00-\x1f\x7f]+\.)+)lora_([ab])")
_EVERY_LAYER = -1  # mlx_lm takes the last num_layers, and all of them for a number below 1
_MAX_JSON_BYTES = 1_000_000


def write_mlx(adapter: Adapter, path: str | Path) -> Adapter:
    """Write `adapter` as MLX-LM reads it, at once or not at all; return it as it will be read back.

    One scaling for all modules is written as it is. Several are folded into B, and ranks padded with zeros.

    Raises:
        AdapterFileError: it has biases, or modules that do not lie in `model.layers`.
        OutputError: `path` cannot be written, or holds something else.
    """
    path = Path(path)
    require_plain(adapter, "--to mlx")
    paths = list(adapter.factors)
    if not any(map(_LAYER.fullmatch, paths)):
        raise AdapterFileError(
            f"{path} was not written: MLX-LM numbers its layers model.layers.N, and these modules are named "
            f"{paths[0]}, …; models named otherwise are renamed there, which is not known here."
        )
    has_one_scaling = len({f.scaling for f in adapter.factors.values()}) == 1
    ready = pad_ranks(adapter if has_one_scaling else fold_scaling(adapter).adapter)
    first = next(iter(ready.factors.values()))
    settings = {
        "fine_tune_type": "lora",
        "num_layers": _EVERY_LAYER,
        "lora_parameters": {
            "rank": first.rank,
            "scale": first.scaling,
            "dropout": 0.0,
            "keys": sorted({_key(p) for p in paths}),
        },
    }
    made = replace(ready, config=_config(first.rank, first.scaling, paths))

    def fill(directory: Path) -> None:
        try:
            save_file(_named(ready), directory / MLX_WEIGHTS_NAME, metadata={"format": "mlx"})
        except SafetensorError as error:
            raise OutputError(f"{path} cannot be written: {error}") from error
        text = json.dumps(settings, indent=4, sort_keys=True)
        (directory / MLX_CONFIG_NAME).write_text(text, encoding="utf-8")
        note = sidecar.sidecar_text(made.digest, dict(adapter.provenance))
        (directory / sidecar.FILE_NAME).write_text(note, encoding="utf-8")

    publish_directory(path, fill, replaceable=MLX_FILE_NAMES)
    return made


def is_mlx(path: str | Path) -> bool:
    """Whether the directory holds an adapter of MLX-LM rather than of PEFT."""
    return (Path(path) / MLX_WEIGHTS_NAME).is_file()


def read_mlx(path: str | Path) -> Adapter:
    """Read MLX-LM's adapter in the directory `path`, every tensor of it.

    Raises:
        AdapterFileError: with every fault at once; DoRA and full fine-tunes are no plain LoRA.
    """
    path = Path(path)
    faults: list[str] = []
    try:
        rank, scale = _settings(path / MLX_CONFIG_NAME, faults)
        slots = read_slots(path / MLX_WEIGHTS_NAME, faults)
        pairs = _pairs(slots, faults)
        faults += [fault for p, pair in pairs.items() for fault in _pair_faults(p, pair, rank)]
        refuse(path, faults)
        note = _sidecar(path / sidecar.FILE_NAME, faults)
        factors = _factors(path / MLX_WEIGHTS_NAME, pairs, scale)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    faults += [
        f"{p} holds numbers that are not finite"
        for p, f in factors.items()
        if not (f.A.isfinite().all() and f.B.isfinite().all())
    ]
    adapter = Adapter(_config(rank, scale, factors), factors, provenance=dict(note.provenance))
    if note.content_digest not in (None, adapter.digest):
        faults.append(f"the weights or their scale changed after they were written: see {sidecar.FILE_NAME}")
    refuse(path, faults)
    return adapter


def _named(adapter: Adapter) -> dict[str, Tensor]:
    named = {}
    for path, f in adapter.factors.items():
        named[f"{path}.lora_a"] = f.A.detach().cpu().T.contiguous()
        named[f"{path}.lora_b"] = f.B.detach().cpu().T.contiguous()
    return named


def _key(path: str) -> str:
    match = _LAYER.fullmatch(path)
    return match[2] if match else path


def _config(rank: int, scale: float, paths: Iterable[str]) -> LoRAConfig:
    return LoRAConfig(rank=rank, alpha=scale * rank, targets=_targets(sorted(paths)))


def _targets(paths: list[str]) -> tuple[str, ...]:
    """The keys where every layer from 0 on has them all, else the whole paths."""
    matches = [m for m in map(_LAYER.fullmatch, paths) if m]
    layers, keys = {int(m[1]) for m in matches}, {m[2] for m in matches}
    is_grid = len(matches) == len(paths) == len(layers) * len(keys) and layers == set(range(len(layers)))
    return tuple(sorted(keys)) if is_grid else tuple(paths)


def _settings(file: Path, faults: list[str]) -> tuple[int, float]:
    """Rank and scale; zeros where they are unusable."""
    if not file.is_file():
        faults.append(f"{file.name} is missing; without it the scale is unknown")
        return 0, 0.0
    if file.stat().st_size > _MAX_JSON_BYTES:
        faults.append(
            f"{file.name} is {file.stat().st_size:,} bytes long; at most {_MAX_JSON_BYTES:,} are read"
        )
        return 0, 0.0
    try:
        values = parse_object(file.read_bytes())
    except ValueError as error:
        faults.append(f"{file.name}: {error}")
        return 0, 0.0
    kind, inner = values.get("fine_tune_type", "lora"), values.get("lora_parameters")
    if kind != "lora":
        faults.append(f'{file.name}: fine_tune_type is {kind!r:.40}; only "lora" can be read')
    inner = inner if isinstance(inner, dict) else {}
    rank, scale = inner.get("rank"), inner.get("scale")
    if type(rank) is not int or rank < 1:
        faults.append(f"{file.name}: lora_parameters.rank is {rank!r:.40}; it must be a whole number from 1")
    if type(scale) not in (int, float) or not 0 < scale < 1e24:  # type: ignore[operator]
        faults.append(f"{file.name}: lora_parameters.scale is {scale!r:.40}; it must be a positive number")
    return (rank, float(scale)) if not faults else (0, 0.0)  # type: ignore[return-value, arg-type]


def _pairs(slots: Mapping[str, Slot], faults: list[str]) -> dict[str, dict[str, Slot]]:
    pairs: dict[str, dict[str, Slot]] = {}
    for name, slot in sorted(slots.items()):
        if match := _FACTOR.fullmatch(name):
            pairs.setdefault(match[1].removesuffix("."), {})[match[2]] = slot
        else:
            faults.append(f"{name!r:.200} is neither lora_a nor lora_b, so its effect would be lost")
    if not pairs and not faults:
        faults.append(f"{MLX_WEIGHTS_NAME} holds no factors")
    return pairs


def _pair_faults(path: str, pair: Mapping[str, Slot], rank: int) -> Iterable[str]:
    if pair.keys() != {"a", "b"}:
        yield f"{path} has no lora_{'a' if 'b' in pair else 'b'}"
        return
    a, b = pair["a"], pair["b"]
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in a.shape + b.shape:
        yield f"{path}: lora_a {a.shape} and lora_b {b.shape} must be (in, rank) and (rank, out)"
    elif not a.shape[1] == b.shape[0] == rank:
        yield f"{path}: lora_a {a.shape} and lora_b {b.shape} do not have the rank {rank} of {MLX_CONFIG_NAME}"
    if a.dtype != b.dtype:
        yield f"{path}: lora_a is {a.dtype}, lora_b is {b.dtype}; they must agree"


def _factors(file: Path, pairs: Mapping[str, Mapping[str, Slot]], scale: float) -> dict[str, Factors]:
    with file.open("rb") as stream:
        return {
            path: Factors(_transposed(stream, pair["a"]), _transposed(stream, pair["b"]), scale)
            for path, pair in pairs.items()
        }


def _transposed(stream: Any, slot: Slot) -> Tensor:
    return read_tensor(stream, slot).T.contiguous()


def _sidecar(file: Path, faults: list[str]) -> sidecar.Sidecar:
    if not file.is_file():
        return sidecar.Sidecar()
    if file.stat().st_size > _MAX_JSON_BYTES:
        faults.append(f"{file.name} is too long")
        return sidecar.Sidecar()
    return sidecar.parse_sidecar(file, file.read_bytes(), faults)
