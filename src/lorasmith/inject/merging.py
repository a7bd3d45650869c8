"""Fold an adapter into the weights of a live model, take it out again, exchange it: exactly.

Every merged weight is W0 + delta, formed in float32 from the pristine W0 and rounded once.
Nothing is ever subtracted: `unmerge` puts back the bits that were there, from where they are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorasmith.errors import ConfigError, MergeStateError
from lorasmith.inject.attach import adapted_layers, check_fit, eject, inject, injection_of, lora_layers
from lorasmith.inject.folding import folded_extras, folded_weight, parameter_names, refuse_unmergeable
from lorasmith.inject.kinds import AdaptedLayer
from lorasmith.lora import Adapter, FileSource, file_source_of

Keep = Literal["auto", "file", "cpu", "device"]
_ATTRIBUTE = "lorasmith_merge"


@dataclass
class MergeState:
    """What `merge` noted on the model.

    Attributes:
        pristine: parameter name → the base's own tensor (memory-mapped from its file, or a copy).
        silenced: LoRA layers that computed before the merge and rest during it.
        is_written: whether `adapter` is in the weights now.
    """

    adapter: Adapter
    keep: Keep
    pristine: dict[str, Tensor] = field(default_factory=dict)
    silenced: list[AdaptedLayer] = field(default_factory=list)
    is_written: bool = False


def merge(model: nn.Module, adapter: Adapter, keep: Keep = "auto") -> None:
    """Fold `adapter` into the weights: W ← round(W0 + scaling · B @ A), in place.

    LoRA that the model carries rests until `unmerge`, so nothing is counted twice.

    Args:
        keep: where the pristine weights stay: `"file"` (the base's own safetensors file, memory
            mapped, no extra memory; verified bit for bit first), `"cpu"` or `"device"` (a copy).
            `"auto"` takes the file where it matches and a CPU copy elsewhere.

    Raises:
        MergeStateError: already merged, a weight shared with another module, or no matching file.
        AdapterFileError: the adapter does not fit this model; no weight was changed.
    """
    if keep not in get_args(Keep):
        raise ConfigError(f"merge: keep={keep!r} is unknown: use one of {', '.join(get_args(Keep))}")
    if is_merged(model):
        raise MergeStateError(
            "merge: an adapter is merged already. Use switch(model, adapter) or unmerge(model)."
        )
    check_fit(model, adapter)
    state = MergeState(adapter, keep)
    _keep_pristine(model, adapter, state)
    model.__dict__[_ATTRIBUTE] = state
    with _all_or_nothing(model, state):
        _write(model, adapter, state)
        state.silenced = [layer for layer in adapted_layers(model).values() if layer.lora_is_active]
        for layer in state.silenced:
            layer.lora_is_active = False
    state.is_written = True


def unmerge(model: nn.Module) -> None:
    """Put the base's own bits back.

    Raises:
        MergeStateError: nothing is merged.
    """
    state = _require_merge(model, "unmerge")
    _restore(model, state, state.pristine)
    for layer in state.silenced:
        layer.lora_is_active = True
    del model.__dict__[_ATTRIBUTE]


def switch(model: nn.Module, adapter: Adapter) -> None:
    """Exchange the adapter of a merged or an injected model for another.

    Merged: each weight is written once, from the pristine bits. Injected: the factors change place.

    Raises:
        MergeStateError: the model is neither merged nor carries LoRA.
        AdapterFileError: the adapter does not fit; the previous one stays.
    """
    if is_merged(model):
        _switch_merged(model, adapter)
    elif injection_of(model) is not None:
        _switch_injected(model, adapter)
    else:
        raise MergeStateError(
            "switch: this model carries no adapter. Use merge(model, adapter) or inject(model, adapter)."
        )


@contextmanager
def merged(model: nn.Module, adapter: Adapter, keep: Keep = "auto") -> Iterator[nn.Module]:
    """Merged inside, and afterwards exactly what was before.

    Nested, the inner adapter takes the place of the outer one, which returns on exit.
    """
    outer = _state(model)
    previous = outer.adapter if outer else None
    if previous is None:
        merge(model, adapter, keep)
    else:
        switch(model, adapter)
    try:
        yield model
    finally:
        if previous is None:
            unmerge(model)
        else:
            switch(model, previous)


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is folded into the weights."""
    return _ATTRIBUTE in model.__dict__


def _switch_merged(model: nn.Module, adapter: Adapter) -> None:
    state = _require_merge(model, "switch")
    check_fit(model, adapter)
    _keep_pristine(model, adapter, state)
    with _all_or_nothing(model, state):
        _restore(model, state, parameter_names(state.adapter) - parameter_names(adapter))
        _write(model, adapter, state)
    state.adapter = adapter


def _switch_injected(model: nn.Module, adapter: Adapter) -> None:
    check_fit(model, adapter)
    layers, injection = lora_layers(model), injection_of(model)
    assert injection is not None
    is_plain = not (adapter.extras or injection.saved or injection.rows or injection.config.parts)
    is_plain = is_plain and adapted_layers(model).keys() == layers.keys() and not injection.config.lora_bias
    same_places = layers.keys() == adapter.factors.keys() and injection.biases.keys() == adapter.biases.keys()
    if is_plain and same_places and not adapter.config.parts:
        for path, layer in layers.items():
            layer.set_factors(adapter.factors[path])
        for path, bias in adapter.biases.items():
            model.get_parameter(f"{path}.bias").data.copy_(bias)
        injection.config = adapter.config
    else:
        eject(model)
        inject(model, adapter)


@torch.no_grad()
def _write(model: nn.Module, adapter: Adapter, state: MergeState) -> None:
    for path, factors in adapter.factors.items():
        if factors.layout.kind == "expert":
            continue
        module, name = model.get_submodule(path), f"{path}.weight"
        weight = model.get_parameter(name)
        weight.data.copy_(folded_weight(module, path, state.pristine[name].to(weight.device), adapter))
    for name, value in folded_extras(model, adapter, state.pristine):
        model.get_parameter(name).data.copy_(value)


@torch.no_grad()
def _restore(model: nn.Module, state: MergeState, names: Iterable[str]) -> None:
    for name in names:
        model.get_parameter(name).data.copy_(state.pristine[name])


@contextmanager
def _all_or_nothing(model: nn.Module, state: MergeState) -> Iterator[None]:
    """On any exception the model is as it was before: merged with `state.adapter`, or pristine."""
    try:
        yield
    except BaseException:
        _restore(model, state, state.pristine)
        if state.is_written:
            _write(model, state.adapter, state)
        else:
            del model.__dict__[_ATTRIBUTE]
        raise


@torch.no_grad()
def _keep_pristine(model: nn.Module, adapter: Adapter, state: MergeState) -> None:
    """Remember the base's bits of every parameter that `adapter` will change."""
    refuse_unmergeable(model, adapter)
    _refuse_shared(model, adapter)
    source = file_source_of(model) if state.keep in ("auto", "file") else None
    missing = parameter_names(adapter) - state.pristine.keys()
    on_file = _matching_file_tensors(model, source, missing) if source else {}
    if state.keep == "file" and on_file.keys() != missing:
        raise MergeStateError(
            f'merge: keep="file", but {len(missing - on_file.keys())} weights have no equal tensor in the '
            'file that the model came from. Use keep="cpu" or keep="device".'
        )
    for name in missing:
        live = model.get_parameter(name).data
        if name in on_file:
            state.pristine[name] = on_file[name]
        else:
            state.pristine[name] = live.clone() if state.keep == "device" else live.to("cpu", copy=True)


def _matching_file_tensors(model: nn.Module, source: FileSource, names: Iterable[str]) -> dict[str, Tensor]:
    """Memory-mapped tensors of the base's files that equal the live weights bit for bit."""
    found: dict[str, Tensor] = {}
    by_file: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if name in source.tensors:
            file, key = source.tensors[name]
            by_file.setdefault(str(file), []).append((name, key))
    for path, entries in by_file.items():
        with safe_open(path, framework="pt") as tensors:
            for name, key in entries:
                live, stored = model.get_parameter(name).data, tensors.get_tensor(key)
                if stored.dtype == live.dtype and torch.equal(live.cpu(), stored):
                    found[name] = stored
    return found


def _refuse_shared(model: nn.Module, adapter: Adapter) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for name in sorted(parameter_names(adapter)):
        others = [n for n in owners[model.get_parameter(name).data_ptr()] if n != name]
        if others and model.get_parameter(name).numel():
            raise MergeStateError(
                f"merge: {name} shares its memory with {', '.join(others)}, which would change too. "
                "Leave it out of the adapter's targets, or serve the adapter unmerged."
            )


def _state(model: nn.Module) -> MergeState | None:
    return model.__dict__.get(_ATTRIBUTE)


def _require_merge(model: nn.Module, verb: str) -> MergeState:
    state = _state(model)
    if state is None:
        raise MergeStateError(
            f"{verb}: no adapter is merged into this model. Call merge(model, adapter) first."
        )
    return state
