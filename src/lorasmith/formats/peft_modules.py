"""From the tensors of a file and its settings to modules: what belongs together, and what does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from lorasmith.formats.container import Slot
from lorasmith.formats.peft_config import MAX_RANK, FileConfig
from lorasmith.formats.peft_names import Part, TensorName
from lorasmith.formats.peft_tensors import EXPERTS, flat_shapes, in_wrapping_order, layout_of, pair_faults
from lorasmith.lora import LINEAR, Layout

_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT saves these whole, unasked, after their size changed
_WHAT = {"shift": "a bias inside the factors", "magnitude": "a DoRA magnitude"}


@dataclass(frozen=True, slots=True)
class ModuleHeader:
    """One module's pair: `A_shape` (rank, in_features), `B_shape` (out_features, rank).

    Of a stacked parameter with its experts: (experts · rank, in_features), (out_features, experts · rank).
    """

    A_shape: tuple[int, int]
    B_shape: tuple[int, int]
    dtype: torch.dtype
    rank: int
    scaling: float
    layout: Layout = LINEAR


@dataclass
class Tensors:
    """The tensors of a file by what they are.

    Attributes:
        slots: (module path, part) → where the tensor lies; a whole weight is at its parameter's name.
        embeddings: paths whose factors are an embedding's.
        copies: names of whole weights that are the base's own, beside factors.
        stacks: paths of stacked parameters.
    """

    slots: dict[tuple[str, Part], Slot] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    copies: set[str] = field(default_factory=set)
    stacks: set[str] = field(default_factory=set)

    @property
    def factor_paths(self) -> list[str]:
        """Paths that have an A or a B."""
        return sorted({path for path, part in self.slots if part in ("A", "B")})

    def of(self, part: Part) -> dict[str, Slot]:
        """Path → slot of one part."""
        return {path: slot for (path, p), slot in self.slots.items() if p == part}


def gather_tensors(
    named: Mapping[str, tuple[TensorName, Slot]], config: FileConfig | None, faults: list[str]
) -> Tensors:
    """Put every tensor in its place; what has none goes to `faults`."""
    found = Tensors()
    depths: dict[str, int] = {}
    for name, _ in named.values():
        if name.part in ("A", "B"):
            depths[name.path] = max(depths.get(name.path, 0), name.depth)
    for given, (name, slot) in sorted(named.items()):
        path = name.path
        if name.part in ("A", "B") and config is not None and not config.rules.selects(path):
            path = _stacked_path(name, depths[path], config, found, faults)
        elif name.depth:
            faults.append(f"{given!r} is under base_layer, where only factors of bare parameters are")
        key = (path, name.part)
        if key in found.slots:
            faults.append(f"{given!r} is the second {key[1]} of {key[0]}")
        found.slots[key] = slot
        if name.is_embedding:
            found.embeddings.add(path)
        if name.is_copy:
            found.copies.add(path)
    return found


def _stacked_path(
    name: TensorName, deepest: int, config: FileConfig, found: Tensors, faults: list[str]
) -> str:
    parameters = in_wrapping_order(config.stacked(name.path))
    if not parameters and not name.depth:
        return name.path  # no stack: an unselected module, which is another fault
    if len(parameters) != deepest + 1:
        faults.append(
            f"{name.path} has factors of {deepest + 1} bare parameters, target_parameters names "
            f"{', '.join(parameters) or 'none'}"
        )
        return f"{name.path}.{name.depth}"
    path = f"{name.path}.{parameters[deepest - name.depth]}"
    found.stacks.add(path)
    return path


def module_headers(tensors: Tensors, config: FileConfig, faults: list[str]) -> dict[str, ModuleHeader]:
    """Path → header of every sound pair; faults of the others, and of everything else."""
    modules: dict[str, ModuleHeader] = {}
    for path in tensors.factor_paths:
        A, B = tensors.slots.get((path, "A")), tensors.slots.get((path, "B"))
        if A is None or B is None:
            faults.append(f"{path} has no lora_{'A' if A is None else 'B'}")
            continue
        found = [*pair_faults(A.shape, B.shape, max_rank=MAX_RANK, is_stack=path in tensors.stacks)]
        if A.dtype != B.dtype:
            found.append(f"A is {A.dtype}, B is {B.dtype}; they must agree")
        found = found or list(_setting_faults(path, A, B, config, is_stack=path in tensors.stacks))
        faults += [f"{path}: {fault}" for fault in found]
        if not found:
            modules[path] = _header(path, A, B, config, tensors)
    faults += _part_faults(tensors, config)
    return modules


def _header(path: str, A: Slot, B: Slot, config: FileConfig, tensors: Tensors) -> ModuleHeader:
    if path in tensors.stacks:
        layout = EXPERTS
    else:
        layout = layout_of(A.shape, B.shape, is_embedding=path in tensors.embeddings)
    A_shape, B_shape = flat_shapes(A.shape, B.shape)
    return ModuleHeader(A_shape, B_shape, A.dtype, config.rank_of(path), config.scaling_of(path), layout)


def _setting_faults(path: str, A: Slot, B: Slot, config: FileConfig, *, is_stack: bool) -> Iterable[str]:
    rank, rows = config.rank_of(path), A.shape[0]
    shapes = f"A {A.shape} and B {B.shape}"
    if is_stack and rows % rank:
        yield f"{shapes} do not divide into experts of rank {rank}"
    elif not is_stack and rank != rows:
        yield f"{shapes} have rank {rows}, adapter_config.json says {rank}"
    if not math.isfinite(config.scaling_of(path)):
        yield "adapter_config.json gives a scaling that is not finite"
    if not is_stack and not config.rules.selects(path):
        yield "it has factors, but target_modules in adapter_config.json does not select it"


def _part_faults(tensors: Tensors, config: FileConfig) -> Iterable[str]:
    pairs = {path: tensors.slots.get((path, "B")) for path in tensors.factor_paths}
    for path, slot in tensors.of("bias").items():
        yield from _bias_faults(path, slot, pairs, config)
    for name in tensors.of("weight"):
        yield from _weight_faults(name, pairs, tensors, config)
    for path, slot in tensors.of("rows").items():
        ids = config.rows_of(path)
        if len(slot.shape) != 2 or slot.shape[0] != len(ids):
            yield f"{path}: trained rows of shape {slot.shape} for {len(ids)} tokens in trainable_token_indices"
    if config.token_rows and not tensors.of("rows"):
        yield "trainable_token_indices is set, but the file holds no trained rows"
    if config.lora.modules_to_save and not (tensors.of("weight") or tensors.of("bias")):
        yield (
            f"modules_to_save names {', '.join(config.lora.modules_to_save)}, but the file holds none of its weights"
        )
    yield from _vector_faults("magnitude", "use_dora", config.use_dora, tensors, set(pairs))
    for entry in config.lora.target_parameters:
        if not any(f".{path}".endswith(f".{entry}") for path in tensors.stacks):
            yield f"target_parameters names {entry}, but the file holds no factors of such a parameter"
    without = tensors.embeddings | tensors.stacks
    yield from _vector_faults("shift", "lora_bias", config.lora.lora_bias, tensors, set(pairs) - without)


def _vector_faults(
    part: Part, setting: str, is_set: bool, tensors: Tensors, expected: set[str]
) -> Iterable[str]:
    found = tensors.of(part)
    for path, slot in found.items():
        B = tensors.slots.get((path, "B"))
        if not is_set:
            yield f"{path} has {_WHAT[part]}, but adapter_config.json does not set {setting}"
        elif B is None:
            yield f"{path} has {_WHAT[part]} but no factors"
        elif math.prod(slot.shape) != B.shape[0]:
            yield f"{path}: {_WHAT[part]} of shape {slot.shape}, B has {B.shape}"
    if is_set:
        yield from (
            f"{path} lacks {_WHAT[part]}, which {setting} means" for path in sorted(expected - set(found))
        )


def _weight_faults(
    name: str, pairs: Mapping[str, Slot | None], tensors: Tensors, config: FileConfig
) -> Iterable[str]:
    owner = name.rpartition(".")[0]
    if name in tensors.copies:
        if owner not in pairs:
            yield f"{name!r} is a copy of the base's own weight, and has no factors beside it"
    elif not config.is_whole(owner) and owner.rpartition(".")[2] not in _EMBEDDINGS:
        yield f"{name!r} is unexpected: modules_to_save in adapter_config.json does not name its module"


def _bias_faults(
    path: str, slot: Slot, pairs: Mapping[str, Slot | None], config: FileConfig
) -> Iterable[str]:
    mode, B = config.lora.bias, pairs.get(path)
    if not config.is_whole(path) and (mode == "none" or (mode == "lora_only" and path not in pairs)):
        yield f'{path} has a trained bias, but adapter_config.json says bias="{mode}"'
    if len(slot.shape) != 1:
        yield f"{path}: the bias has shape {slot.shape}; one axis is needed"
    elif B is not None and slot.shape != B.shape[:1]:
        yield f"{path}: the bias has shape {slot.shape}, B has {B.shape}"
