"""`read_header`: everything about an adapter but its numbers, in milliseconds, strictly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.errors import AdapterFileError
from lorasmith.formats import sidecar
from lorasmith.formats.container import Slot, read_slots
from lorasmith.formats.peft_config import MAX_RANK, FileConfig, parse_config
from lorasmith.formats.peft_names import Part, parse_name
from lorasmith.formats.peft_rules import steps_fault
from lorasmith.formats.strict_json import parse_object
from lorasmith.lora import LoRAConfig

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FILE_NAMES = (WEIGHTS_NAME, CONFIG_NAME, sidecar.FILE_NAME)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_JSON_BYTES = 32_000_000
_MAX_FAULTS_SHOWN = 40


@dataclass(frozen=True, slots=True)
class ModuleHeader:
    """One module's pair: `A_shape` (rank, in_features), `B_shape` (out_features, rank)."""

    A_shape: tuple[int, int]
    B_shape: tuple[int, int]
    dtype: torch.dtype
    rank: int
    scaling: float


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter without its weights.

    Attributes:
        modules: module path → shapes, dtype, rank and scaling.
        biases: module path → shape of the trained bias.
        fan_in_fan_out: the base stores its weights transposed, (in_features, out_features).
        base_name: the base that the file names, if any.
        provenance: what the sidecar says; empty without one.
        content_digest: what `Adapter.digest` must be; none without a sidecar.
        slots: (module path, part) → where the tensor lies in the file.
    """

    path: Path
    config: LoRAConfig
    modules: Mapping[str, ModuleHeader]
    biases: Mapping[str, tuple[int, ...]]
    fan_in_fan_out: bool
    base_name: str | None
    provenance: Mapping[str, Any]
    content_digest: str | None
    slots: Mapping[tuple[str, Part], Slot] = field(repr=False)


def read_header(path: str | Path) -> AdapterHeader:
    """Read config, names and shapes of the adapter in the directory `path`; load no weights.

    Raises:
        AdapterFileError: with every fault at once.
    """
    path = Path(path)
    faults: list[str] = []
    try:
        _check_place(path)
        file_config = _read_config(path / CONFIG_NAME, faults)
        side = _read_sidecar(path / sidecar.FILE_NAME, faults)
        raw_slots = read_slots(path / WEIGHTS_NAME, faults)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    slots = _by_module(raw_slots, faults)
    modules, config = _modules(slots, file_config, faults)
    refuse(path, faults)
    if config is None or file_config is None:  # unreachable: both leave a fault
        raise AdapterFileError(f"{path} has no usable {CONFIG_NAME}")
    biases = {p: slot.shape for (p, part), slot in slots.items() if part == "bias"}
    return AdapterHeader(
        path=path,
        config=config,
        modules=modules,
        biases=biases,
        fan_in_fan_out=file_config.fan_in_fan_out,
        base_name=file_config.base_name,
        provenance=side.provenance,
        content_digest=side.content_digest,
        slots=slots,
    )


def refuse(path: Path, faults: list[str]) -> None:
    """Raise one `AdapterFileError` that lists all faults, if there are any."""
    if not faults:
        return
    shown = [f"  {fault}" for fault in faults[:_MAX_FAULTS_SHOWN]]
    if len(faults) > _MAX_FAULTS_SHOWN:
        shown.append(f"  … and {len(faults) - _MAX_FAULTS_SHOWN} more")
    raise AdapterFileError(f"{path} is not a usable adapter; nothing was loaded.\n" + "\n".join(shown))


def _check_place(path: Path) -> None:
    if not path.is_dir():
        what = "is a file; give the directory that holds it" if path.is_file() else "does not exist"
        raise AdapterFileError(
            f"{path} {what}. An adapter is a directory with {WEIGHTS_NAME} and {CONFIG_NAME}."
        )
    if (path / WEIGHTS_NAME).is_file():
        return
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise AdapterFileError(
            f"{path} holds {', '.join(pickles[:5])} but no {WEIGHTS_NAME}. That is a pickle, and opening one "
            "runs the code inside. Convert it where it was made: load it with PEFT there and call "
            "save_pretrained(..., safe_serialization=True)."
        )
    inner = sorted(p.parent.name for p in path.glob(f"*/{CONFIG_NAME}"))
    hint = f" Did you mean {path / inner[0]}?" if inner else ""
    raise AdapterFileError(f"{path} has no {WEIGHTS_NAME}.{hint}")


def _read_bounded(path: Path) -> bytes:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise AdapterFileError(
            f"{path} is {path.stat().st_size:,} bytes long; at most {_MAX_JSON_BYTES:,} are read"
        )
    return path.read_bytes()


def _read_config(path: Path, faults: list[str]) -> FileConfig | None:
    if not path.is_file():
        faults.append(f"{path.name} is missing; without it rank and scaling are unknown")
        return None
    found: list[str] = []
    try:
        return parse_config(parse_object(_read_bounded(path)), found)
    except ValueError as error:
        found.append(str(error))
        return None
    finally:
        faults += [f"{path.name}: {fault}" for fault in found]


def _read_sidecar(path: Path, faults: list[str]) -> sidecar.Sidecar:
    return sidecar.parse_sidecar(path, _read_bounded(path), faults) if path.is_file() else sidecar.Sidecar()


def _by_module(raw: Mapping[str, Slot], faults: list[str]) -> dict[tuple[str, Part], Slot]:
    slots: dict[tuple[str, Part], Slot] = {}
    for name, slot in sorted(raw.items()):
        try:
            key = parse_name(name)
        except ValueError as error:
            faults.append(f"{name!r} {error}")
            continue
        if key in slots:
            faults.append(f"{name!r} is the second {key[1]} of {key[0]}")
        slots[key] = slot
    if not raw and not faults:
        faults.append(f"{WEIGHTS_NAME} holds no tensors (sharded training must gather before it saves)")
    return slots


def _modules(
    slots: Mapping[tuple[str, Part], Slot], file_config: FileConfig | None, faults: list[str]
) -> tuple[dict[str, ModuleHeader], LoRAConfig | None]:
    paths = sorted({path for path, part in slots if part != "bias"})
    pairs = {path: (slots.get((path, "A")), slots.get((path, "B"))) for path in paths}
    sound: dict[str, tuple[Slot, Slot]] = {}
    for path, (A, B) in pairs.items():
        if A is None or B is None:
            faults.append(f"{path} has no lora_{'A' if A is None else 'B'}")
        elif found := list(_pair_faults(A, B)):
            faults += [f"{path}: {fault}" for fault in found]
        else:
            sound[path] = (A, B)
    if not paths and slots:
        faults.append(f"{WEIGHTS_NAME} holds no factors")
    if file_config is None:
        return {}, None
    config_faults = list(_config_faults(sound, slots, file_config))
    faults += config_faults
    if config_faults:
        return {}, None
    modules = {
        path: ModuleHeader(
            (A.shape[0], A.shape[1]),
            (B.shape[0], B.shape[1]),
            A.dtype,
            A.shape[0],
            file_config.scaling_of(path),
        )
        for path, (A, B) in sound.items()
    }
    is_expressible = not file_config.rules.layers_pattern
    return modules, file_config.lora if is_expressible else replace(file_config.lora, targets=tuple(paths))


def _pair_faults(A: Slot, B: Slot) -> Iterable[str]:
    shapes = f"A {A.shape} and B {B.shape}"
    if 0 in A.shape + B.shape:
        yield f"{shapes} hold nothing; sharded training must gather before it saves"
    elif len(A.shape) > 2 or len(B.shape) > 2:
        yield f"{shapes} belong to a convolution, which cannot be applied yet"
    elif len(A.shape) != 2 or len(B.shape) != 2:
        yield f"{shapes} must be (rank, in_features) and (out_features, rank)"
    elif A.shape[0] != B.shape[1]:
        yield f"{shapes} disagree on the rank"
    elif A.shape[0] > MAX_RANK:
        yield f"{shapes} have rank {A.shape[0]:,}; at most {MAX_RANK:,} is allowed"
    if A.dtype != B.dtype:
        yield f"A is {A.dtype}, B is {B.dtype}; they must agree"


def _config_faults(
    pairs: Mapping[str, tuple[Slot, Slot]], slots: Mapping[tuple[str, Part], Slot], file_config: FileConfig
) -> Iterable[str]:
    longest = max((len(path) for path, _ in slots), default=0)
    slow = [(r, why) for r in file_config.regexes() if (why := steps_fault(r, longest))]
    for regex, why in slow:
        yield f"{CONFIG_NAME}: the regular expression {regex!r:.80} is refused: {why}"
    if slow:
        return
    for path, (A, B) in pairs.items():
        if (rank := file_config.rank_of(path)) != A.shape[0]:
            shapes = f"A {A.shape} and B {B.shape}"
            yield f"{path}: {shapes} have rank {A.shape[0]}, {CONFIG_NAME} says {rank}"
        if not math.isfinite(file_config.scaling_of(path)):
            yield f"{path}: {CONFIG_NAME} gives a scaling that is not finite"
        if not file_config.rules.selects(path):
            yield f"{path} has factors, but target_modules in {CONFIG_NAME} does not select it"
    for path, part in slots:
        if part == "bias":
            yield from _bias_faults(path, slots[path, part], pairs, file_config.lora.bias)


def _bias_faults(path: str, slot: Slot, pairs: Mapping[str, tuple[Slot, Slot]], mode: str) -> Iterable[str]:
    if mode == "none" or (mode == "lora_only" and path not in pairs):
        yield f'{path} has a trained bias, but {CONFIG_NAME} says bias="{mode}"'
    if len(slot.shape) != 1:
        yield f"{path}: the bias has shape {slot.shape}; one axis is needed"
    elif path in pairs and slot.shape != pairs[path][1].shape[:1]:
        yield f"{path}: the bias has shape {slot.shape}, B has {pairs[path][1].shape}"
