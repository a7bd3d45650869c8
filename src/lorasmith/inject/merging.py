"""Fold an adapter into the weights of a live model, take it out again, exchange it: exactly.

Every merged weight is W0 + delta, formed in float32 from the pristine W0 and rounded once.
Nothing is ever subtracted: `unmerge` puts back the bits that were there, from where they are kept.
A weight that other modules use too is changed in place only where all of them get the same delta;
otherwise the adapted module has a weight of its own while the merge lasts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lorasmith.errors import ConfigError, MergeStateError
from lorasmith.inject.attach import adapted_layers, check_fit, eject, inject, injection_of, lora_layers
from lorasmith.inject.folding import (
    changed_names,
    expert_stacks,
    folded_value,
    is_low_rank,
    refuse_quantised,
    refuse_unmergeable,
    same_change,
)
from lorasmith.inject.kinds import AdaptedLayer
from lorasmith.inject.layer import shape_of
from lorasmith.inject.parallel import SCRATCH_ELEMENTS, Job, run_jobs
from lorasmith.inject.pristine import Keep, keep_pristine
from lorasmith.inject.rows import rows_by_weight
from lorasmith.inject.tying import head_is_tied, parameter_slots, shared_parameters, tied_configs
from lorasmith.lora import Adapter, Factors, TokenRows, add_delta, factors_of_rows, file_source_of

_ATTRIBUTE = "lorasmith_merge"


@dataclass
class MergeState:
    """What `merge` noted on the model.

    Attributes:
        pristine: name of a parameter that is written in place → the base's own tensor
            (memory-mapped from its file, or a copy).
        written: names whose parameter may differ from its pristine bits now.
        shared: name of a parameter that has memory of its own now → the one that it shares else.
        untied: configurations that said "tied" before.
        silenced: LoRA layers that computed before the merge and rest during it.
    """

    adapter: Adapter
    keep: Keep
    pristine: dict[str, Tensor] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    untied: list[Any] = field(default_factory=list)
    silenced: list[AdaptedLayer] = field(default_factory=list)


@dataclass
class Plan:
    """What an adapter changes, and where.

    Attributes:
        in_place: name → the base's own parameter, written where it lies.
        separate: name → the base's own parameter, for those that need memory of their own.
        rows: name of a weight → the trained token rows that it gets.
        stacks: name of a stacked parameter → the factors of its experts.
    """

    in_place: dict[str, nn.Parameter]
    separate: dict[str, nn.Parameter]
    rows: dict[str, TokenRows]
    stacks: dict[str, list[Factors]]


def merge(model: nn.Module, adapter: Adapter, keep: Keep = "auto") -> None:
    """Fold `adapter` into the weights: W ← round(W0 + scaling · B @ A), in place.

    LoRA that the model carries rests until `unmerge`, so nothing is counted twice.

    Args:
        keep: where the pristine weights stay: `"file"` (the base's own safetensors file, memory
            mapped, no extra memory; verified bit for bit first), `"cpu"` or `"device"` (a copy).
            `"auto"` takes the file where it matches and a CPU copy elsewhere.

    Raises:
        MergeStateError: already merged, a weight that is not floating point, or no matching file.
        AdapterFileError: the adapter does not fit this model; no weight was changed.
    """
    if keep not in get_args(Keep):
        raise ConfigError(f"merge: keep={keep!r} is unknown: use one of {', '.join(get_args(Keep))}")
    if is_merged(model):
        raise MergeStateError(
            "merge: an adapter is merged already. Use switch(model, adapter) or unmerge(model)."
        )
    check_fit(model, adapter)
    _exchange(model, MergeState(adapter, keep), adapter)


def unmerge(model: nn.Module) -> None:
    """Put the base's own bits back.

    Raises:
        MergeStateError: nothing is merged.
    """
    _put_base_back(model, _require_merge(model, "unmerge"))


def switch(model: nn.Module, adapter: Adapter) -> None:
    """Exchange the adapter of a merged or an injected model for another.

    Merged: each weight is written once, from the pristine bits. Injected: the factors change place.

    Raises:
        MergeStateError: the model is neither merged nor carries LoRA.
        AdapterFileError: the adapter does not fit; the previous one stays.
    """
    if is_merged(model):
        check_fit(model, adapter)
        _exchange(model, _require_merge(model, "switch"), adapter)
    elif injection_of(model) is not None:
        _switch_injected(model, adapter)
    else:
        raise MergeStateError(
            "switch: this model carries no adapter. Use merge(model, adapter) or inject(model, adapter)."
        )


@contextmanager
def merged(model: nn.Module, adapter: Adapter, keep: Keep = "auto") -> Iterator[nn.Module]:
    """Merged inside, and afterwards exactly what was before, whatever was merged or unmerged inside.

    Nested, the inner adapter takes the place of the outer one, which returns on exit.
    """
    outer = _state(model)
    previous = outer.adapter if outer else None
    _bring_about(model, adapter, outer.keep if outer else keep)
    try:
        yield model
    finally:
        _bring_about(model, previous, outer.keep if outer else keep)


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is folded into the weights."""
    return _ATTRIBUTE in model.__dict__


def _bring_about(model: nn.Module, adapter: Adapter | None, keep: Keep) -> None:
    """Make `adapter` the merged one, or none, from any state."""
    if adapter is None:
        if is_merged(model):
            unmerge(model)
    elif is_merged(model):
        switch(model, adapter)
    else:
        merge(model, adapter, keep)


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
def _exchange(model: nn.Module, state: MergeState, adapter: Adapter) -> None:
    """Write `adapter` in the place of what `state` says is written: one pass over the weights.

    On any exception the model is as it was before; where even that fails, it is the pristine base.
    """
    before = state.adapter if is_merged(model) else None
    plan = _plan(model, state, adapter)
    unkept = {name: p.data for name, p in plan.in_place.items() if name not in state.pristine}
    state.pristine |= keep_pristine(unkept, state.keep, file_source_of(model))
    try:
        model.__dict__[_ATTRIBUTE] = state
        if before is None:
            _silence(model, state)
        _write(model, state, adapter, plan)
    except BaseException as error:
        _go_back(model, state, before, error)
        raise
    state.adapter = adapter


def _go_back(model: nn.Module, state: MergeState, before: Adapter | None, error: BaseException) -> None:
    if before is not None:
        try:
            _write(model, state, before, _plan(model, state, before))
            return
        except BaseException:
            error.add_note("The adapter that was merged before could not be put back: the model is the base.")
    _put_base_back(model, state)


@torch.no_grad()
def _put_base_back(model: nn.Module, state: MergeState) -> None:
    _restore(model, state, list(state.written))
    _share_again(model, state, list(state.shared))
    for layer in state.silenced:
        layer.lora_is_active = True
    del model.__dict__[_ATTRIBUTE]


def _silence(model: nn.Module, state: MergeState) -> None:
    state.silenced = [layer for layer in adapted_layers(model).values() if layer.lora_is_active]
    for layer in state.silenced:
        layer.lora_is_active = False


def _plan(model: nn.Module, state: MergeState, adapter: Adapter) -> Plan:
    """Sort what `adapter` changes by where it can be written.

    Raises:
        MergeStateError: something of the adapter has no weight to go into, or one that is not floating point.
    """
    refuse_quantised(model, adapter)
    base = {name: state.shared.get(name, live) for name, live in parameter_slots(model)}
    refuse_unmergeable(model, adapter, base, _base_values(state, base))
    rows = rows_by_weight(base, adapter)
    names = changed_names(adapter) | rows.keys()
    quantised = [f"{n} ({base[n].dtype})" for n in sorted(names) if not base[n].is_floating_point()]
    if quantised:
        raise MergeStateError(
            f"merge: {len(quantised)} weights are not floating point: {', '.join(quantised[:3])}. "
            "Serve the adapter unmerged, or load the base in bf16, fp16 or fp32."
        )
    separate, follow = shared_parameters(base, names, partial(same_change, model, adapter, rows))
    in_place = {name: base[name] for name in base if name in names - separate - follow}
    return Plan(in_place, {name: base[name] for name in separate}, rows, expert_stacks(adapter))


def _base_values(state: MergeState, base: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Name → the bits of the base, also while other ones are written there."""
    kept = {id(base[name]): tensor for name, tensor in state.pristine.items()}
    return {name: kept.get(id(parameter), parameter.data) for name, parameter in base.items()}


def _write(model: nn.Module, state: MergeState, adapter: Adapter, plan: Plan) -> None:
    """Bring every parameter from whatever it holds to what `adapter` makes of the base."""
    _restore(model, state, list(state.written - plan.in_place.keys()))
    _share_again(model, state, list(state.shared.keys() - plan.separate.keys()))
    state.written.update(plan.in_place)
    for name in plan.separate.keys() - state.shared.keys():
        state.shared[name] = shared = plan.separate[name]
        _set_parameter(model, name, nn.Parameter(torch.empty_like(shared), shared.requires_grad))
    _note_tying(model, state)
    jobs = [
        job for name in (*plan.in_place, *plan.separate) for job in _jobs(model, state, adapter, plan, name)
    ]
    run_jobs(jobs, inline=_is_elsewhere((plan.in_place | plan.separate).values()))


def _jobs(model: nn.Module, state: MergeState, adapter: Adapter, plan: Plan, name: str) -> Iterable[Job]:
    """The work of writing one parameter: where a low-rank term is added, in pieces that fit the scratch."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    target = module._parameters[kind].data  # type: ignore[union-attr]
    base = state.shared[name].data if name in state.shared else state.pristine[name]
    if not is_low_rank(adapter, name):
        pairs, rows = plan.stacks.get(name), plan.rows.get(name)
        return [partial(_fold_whole, target, base, module, name, adapter, pairs, rows)]
    factors, transposed = adapter.factors[path], shape_of(module).transposed
    pieces = -(-target.numel() // SCRATCH_ELEMENTS) if target.device.type == "cpu" else 1
    if pieces == 1:
        return [partial(_fold, target, base, factors, transposed)]
    edges = [len(target) * i // pieces for i in range(pieces + 1)]
    return [
        partial(
            _fold, target[cut], base[cut], factors_of_rows(factors, cut, transposed=transposed), transposed
        )
        for cut in map(slice, edges, edges[1:])
    ]


def _fold(target: Tensor, base: Tensor, factors: Factors, transposed: bool, scratch: Tensor) -> None:
    fits = target.device == scratch.device and target.numel() <= scratch.numel()
    base = base.to(target.device)
    add_delta(base, factors, transposed=transposed, out=target, scratch=scratch if fits else None)


def _fold_whole(
    target: Tensor,
    base: Tensor,
    module: nn.Module,
    name: str,
    adapter: Adapter,
    pairs: list[Factors] | None,
    rows: TokenRows | None,
    scratch: Tensor,
) -> None:
    target.copy_(folded_value(module, name, base.to(target.device), adapter, pairs=pairs, rows=rows))


def _copy(target: Tensor, source: Tensor, scratch: Tensor | None = None) -> None:
    target.copy_(source)


def _restore(model: nn.Module, state: MergeState, names: list[str]) -> None:
    pairs = [(model.get_parameter(name).data, state.pristine[name]) for name in names]
    run_jobs([partial(_copy, *pair) for pair in pairs], inline=_is_elsewhere(live for live, _ in pairs))
    state.written.difference_update(names)


def _is_elsewhere(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.device.type != "cpu" for tensor in tensors)


def _share_again(model: nn.Module, state: MergeState, names: list[str]) -> None:
    for name in names:
        _set_parameter(model, name, state.shared[name])
        del state.shared[name]
    _note_tying(model, state)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, key = name.rpartition(".")
    model.get_submodule(path)._parameters[key] = parameter


def _note_tying(model: nn.Module, state: MergeState) -> None:
    """A model saved while its head has a weight of its own must not be loaded with a tied one."""
    for config in state.untied:
        config.tie_word_embeddings = True
    state.untied = tied_configs(model) if state.shared and not head_is_tied(model) else []
    for config in state.untied:
        config.tie_word_embeddings = False


def _state(model: nn.Module) -> MergeState | None:
    return model.__dict__.get(_ATTRIBUTE)


def _require_merge(model: nn.Module, verb: str) -> MergeState:
    state = _state(model)
    if state is None:
        raise MergeStateError(
            f"{verb}: no adapter is merged into this model. Call merge(model, adapter) first."
        )
    return state
