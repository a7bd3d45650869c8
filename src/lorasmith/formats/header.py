"""`read_header`: everything about an adapter but its numbers, in milliseconds, strictly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorasmith.errors import AdapterFileError
from lorasmith.formats import sidecar
from lorasmith.formats.container import Slot, read_slots
from lorasmith.formats.peft_config import FileConfig, parse_config
from lorasmith.formats.peft_modules import ModuleHeader, Tensors, gather_tensors, module_headers
from lorasmith.formats.peft_names import Part, TensorName, parse_name
from lorasmith.formats.peft_rules import steps_fault
from lorasmith.formats.strict_json import parse_object
from lorasmith.lora import LINEAR, LoRAConfig

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FILE_NAMES = (WEIGHTS_NAME, CONFIG_NAME, sidecar.FILE_NAME)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_JSON_BYTES = 32_000_000
_MAX_FAULTS_SHOWN = 40
_BEYOND = {
    "weight": "whole weight",
    "rows": "token rows",
    "shift": "lora_bias",
    "magnitude": "DoRA magnitude",
}


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter without its weights.

    Attributes:
        modules: module path → shapes, dtype, rank and scaling.
        biases: module path → shape of the trained bias.
        weights: parameter name → shape of the whole trained weight.
        copies: names among `weights` that are PEFT's copies of the base's own.
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
    weights: Mapping[str, tuple[int, ...]]
    copies: frozenset[str]
    fan_in_fan_out: bool
    base_name: str | None
    provenance: Mapping[str, Any]
    content_digest: str | None
    slots: Mapping[tuple[str, Part], Slot] = field(repr=False)

    @property
    def beyond_linear(self) -> str:
        """What is here besides factors of linear layers and biases, in words; empty for plain LoRA."""
        kinds: Counter[str] = Counter(m.layout.kind for m in self.modules.values() if m.layout != LINEAR)
        kinds.update(_BEYOND[part] for _, part in self.slots if part in _BEYOND)
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def read_header(path: str | Path, *, is_shifted: bool = False) -> AdapterHeader:
    """Read config, names and shapes of the adapter in the directory `path`; load no weights.

    Args:
        is_shifted: accept factors that fit only a base that was changed before training (PiSSA and
            the like), because the caller makes up for it.

    Raises:
        AdapterFileError: with every fault at once.
    """
    path = Path(path)
    faults: list[str] = []
    try:
        _check_place(path)
        file_config = _read_config(path / CONFIG_NAME, faults, is_shifted)
        side = _read_sidecar(path / sidecar.FILE_NAME, faults)
        raw_slots = read_slots(path / WEIGHTS_NAME, faults)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    tensors = gather_tensors(_parsed(raw_slots, faults), file_config, faults)
    modules, config = _modules(tensors, file_config, faults)
    refuse(path, faults)
    if config is None or file_config is None:  # unreachable: both leave a fault
        raise AdapterFileError(f"{path} has no usable {CONFIG_NAME}")
    return AdapterHeader(
        path=path,
        config=config,
        modules=modules,
        biases={path: slot.shape for path, slot in tensors.of("bias").items()},
        weights={name: slot.shape for name, slot in tensors.of("weight").items()},
        copies=frozenset(tensors.copies),
        fan_in_fan_out=file_config.fan_in_fan_out,
        base_name=file_config.base_name,
        provenance=side.provenance,
        content_digest=side.content_digest,
        slots=tensors.slots,
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
    if (path / "adapters.safetensors").is_file():
        raise AdapterFileError(
            f"{path} holds an adapter of MLX-LM, not of PEFT. Bring it over first: "
            f"lorasmith export {path} --to peft --out DIR"
        )
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


def _read_config(path: Path, faults: list[str], is_shifted: bool) -> FileConfig | None:
    if not path.is_file():
        faults.append(f"{path.name} is missing; without it rank and scaling are unknown")
        return None
    found: list[str] = []
    try:
        return parse_config(parse_object(_read_bounded(path)), found, is_shifted=is_shifted)
    except ValueError as error:
        found.append(str(error))
        return None
    finally:
        faults += [f"{path.name}: {fault}" for fault in found]


def _read_sidecar(path: Path, faults: list[str]) -> sidecar.Sidecar:
    return sidecar.parse_sidecar(path, _read_bounded(path), faults) if path.is_file() else sidecar.Sidecar()


def _parsed(raw: Mapping[str, Slot], faults: list[str]) -> dict[str, tuple[TensorName, Slot]]:
    named: dict[str, tuple[TensorName, Slot]] = {}
    for name, slot in sorted(raw.items()):
        try:
            named[name] = parse_name(name), slot
        except ValueError as error:
            faults.append(f"{name!r} {error}")
    if not raw and not faults:
        faults.append(f"{WEIGHTS_NAME} holds no tensors (sharded training must gather before it saves)")
    return named


def _modules(
    tensors: Tensors, file_config: FileConfig | None, faults: list[str]
) -> tuple[dict[str, ModuleHeader], LoRAConfig | None]:
    paths = tensors.factor_paths
    if not paths and tensors.slots and not (tensors.of("weight") or tensors.of("rows")):
        faults.append(f"{WEIGHTS_NAME} holds no factors")
    if file_config is None or (slow := list(_slow_regexes(tensors, file_config))):
        faults += slow if file_config is not None else _halves(tensors)
        return {}, None
    modules = module_headers(tensors, file_config, faults)
    lora = file_config.lora
    rows = {path: file_config.rows_of(path) for path in tensors.of("rows")}
    if rows and all(rows.values()):
        lora = replace(lora, trainable_tokens=rows)
    if file_config.rules.layers_pattern:
        lora = replace(lora, targets=tuple(path for path in paths if path not in tensors.stacks))
    return modules, lora


def _halves(tensors: Tensors) -> Iterable[str]:
    """Without settings, at least say which pairs are not whole."""
    for path in tensors.factor_paths:
        for part in ("A", "B"):
            if (path, part) not in tensors.slots:
                yield f"{path} has no lora_{part}"


def _slow_regexes(tensors: Tensors, file_config: FileConfig) -> Iterable[str]:
    longest = max((len(path) for path, _ in tensors.slots), default=0)
    for regex in file_config.regexes():
        if why := steps_fault(regex, longest):
            yield f"{CONFIG_NAME}: the regular expression {regex!r:.80} is refused: {why}"
