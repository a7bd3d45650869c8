"""Adapter → the settings of `adapter_config.json`, so that PEFT's rules give each module what it has."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lorasmith.formats.peft_rules import PatternTable, TargetRules, suffixes
from lorasmith.formats.peft_tensors import stacks_of, to_file
from lorasmith.lora import Adapter, BiasMode, Factors, LoRAConfig

_INITS = {"normal": "gaussian", "uniform": True}


def config_values(adapter: Adapter, base_name: str | None) -> dict[str, Any]:
    """Every setting that a PEFT reader needs to reproduce the function; few that older ones do not know."""
    config = _sized(adapter.config, by_place(adapter))
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None if base_name is None else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "use_rslora": config.rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _plain(alpha) for key, alpha in config.alpha_pattern.items()},
        "lora_dropout": config.dropout,
        # with a bias inside the factors PEFT accepts only its own start
        "init_lora_weights": True if adapter.extras.shifts else _INITS[config.init],
        "bias": _bias_mode(adapter),
        "fan_in_fan_out": False,
        "modules_to_save": _whole_modules(adapter) or None,
        "use_dora": bool(adapter.extras.magnitudes),
    }
    layers = [path for path, f in adapter.factors.items() if f.layout.kind != "expert"]
    return values | _selection(config, layers) | _rare_settings(adapter)


def by_place(adapter: Adapter) -> dict[str, Factors]:
    """Path → factors, where a stacked parameter is one place, with the highest rank of its experts."""
    layers = {path: f for path, f in adapter.factors.items() if f.layout.kind != "expert"}
    stacks = stacks_of(adapter.factors)
    return layers | {path: max(pairs, key=lambda f: f.rank) for path, pairs in stacks.items()}


def unwritable(adapter: Adapter) -> Iterable[str]:
    """What PEFT's format, or PEFT itself, has no place for."""
    extras, kinds = adapter.extras, {path: f.layout.kind for path, f in adapter.factors.items()}
    for what, vectors in (("bias inside the factors", extras.shifts), ("DoRA magnitude", extras.magnitudes)):
        lacking = sorted(set(kinds) - set(vectors))
        if vectors and lacking:
            yield f"{lacking[0]} has no {what}, others do; PEFT's format has it for all modules or for none"
    for path, kind in kinds.items():
        if kind == "embedding" and path in extras.shifts:
            yield f"{path}: PEFT has no bias inside the factors of an embedding"
    for stack, experts in stacks_of(adapter.factors).items():
        if adapter.config.dropout:
            yield f"{stack}: PEFT refuses dropout with stacked experts; write it with dropout 0"
        if {f"{stack}.{e}" for e in range(len(experts))} != {p for p in kinds if p.startswith(f"{stack}.")}:
            yield f"{stack}: some of its experts have no factors; PEFT's format has them for all"
        if len({f.scaling for f in experts}) > 1:
            yield f"{stack}: its experts differ in scaling; PEFT's format has one for all"
    for path, f in adapter.factors.items():
        try:
            to_file(f)
        except ValueError as error:
            yield f"{path}: {error}"


def _rare_settings(adapter: Adapter) -> dict[str, Any]:
    """Settings that older readers do not know; there only where they say something."""
    values: dict[str, Any] = {}
    if adapter.extras.shifts:
        values["lora_bias"] = True
    if adapter.extras.rows:
        values["trainable_token_indices"] = {p: list(r.indices) for p, r in adapter.extras.rows.items()}
    if stacks := list(stacks_of(adapter.factors)):
        values["target_parameters"] = stacks
    return values


def _whole_modules(adapter: Adapter) -> list[str]:
    """What `modules_to_save` must name: as the config does where that names them all, else one by one."""
    owners = {name.rpartition(".")[0] for name in adapter.extras.weights} - adapter.factors.keys()
    named = adapter.config.modules_to_save
    if all(any(_around(owner, name) for name in named) for owner in owners | _whole_biases(adapter)):
        return sorted(set(named))
    return sorted(owners | _whole_biases(adapter))


def _whole_biases(adapter: Adapter) -> set[str]:
    """Paths of the biases that belong to whole trained modules."""
    owners = {name.rpartition(".")[0] for name in adapter.extras.weights} - adapter.factors.keys()
    named = adapter.config.modules_to_save
    return {p for p in adapter.biases if p in owners or any(_around(p, name) for name in named)}


def _around(path: str, module: str) -> bool:
    """Whether `module` names the one at `path` or one around it."""
    return f".{path}.".find(f".{module}.") >= 0


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _bias_mode(adapter: Adapter) -> BiasMode:
    loose = adapter.biases.keys() - _whole_biases(adapter)
    if loose - adapter.factors.keys():
        return "all"
    return "lora_only" if loose and adapter.config.bias == "none" else adapter.config.bias


def _selection(config: LoRAConfig, paths: Iterable[str]) -> dict[str, Any]:
    """Name the modules: as the config does where that selects them all, else one by one."""
    paths = sorted(paths)
    rules = TargetRules(config.targets, config.exclude, config.layers)
    names = sorted({path.rpartition(".")[2] for path in paths})
    full: dict[str, Any] = {"target_modules": paths, "layers_to_transform": None}
    if not paths:
        return full
    if config.targets == "all-linear":
        # PEFT's own "all-linear" also depends on the base; the names mean the same for every reader
        is_whole = not config.exclude and config.layers is None and not any(n.isdigit() for n in names)
        return full | {"target_modules": names} if is_whole else full
    if not all(map(rules.selects, paths)) or (isinstance(config.targets, str) and config.layers):
        return full
    kept = {"target_modules": _listed(config.targets), "layers_to_transform": _listed(config.layers)}
    # older readers do not know this key, so it is there only where it says something
    return kept | ({"exclude_modules": _listed(config.exclude)} if config.exclude else {})


def _listed(value: str | tuple[Any, ...] | None) -> str | list[Any] | None:
    return sorted(set(value)) if isinstance(value, tuple) else value


def _sized(config: LoRAConfig, factors: Mapping[str, Factors]) -> LoRAConfig:
    """Return the config with ranks and alphas that are true of every module.

    Its own are kept where they are true already. The file's keys are sorted and the first match
    wins, so a config whose patterns depend on their order is rewritten too.
    """
    config = replace(
        config,
        rank_pattern=dict(sorted(config.rank_pattern.items())),
        alpha_pattern=dict(sorted(config.alpha_pattern.items())),
    )
    ranks, alphas = PatternTable(config.rank_pattern), PatternTable(config.alpha_pattern)

    def is_true(path: str, f: Factors) -> bool:
        rank = int(ranks.get(path, config.rank))
        return rank == f.rank and alphas.get(path, config.alpha) / _divisor(rank, config) == f.scaling

    if all(is_true(path, f) for path, f in factors.items()):
        return config
    rank_of = {path: f.rank for path, f in factors.items()}
    alpha_of = {path: _alpha(f.scaling, _divisor(f.rank, config), config) for path, f in factors.items()}
    rank, alpha = _commonest(rank_of, config.rank), _commonest(alpha_of, config.alpha)
    keys = _unambiguous_keys(factors)
    return replace(
        config,
        rank=int(rank),
        alpha=alpha,
        rank_pattern={keys[path]: r for path, r in sorted(rank_of.items()) if r != rank},
        alpha_pattern={keys[path]: a for path, a in sorted(alpha_of.items()) if a != alpha},
    )


def _divisor(rank: int, config: LoRAConfig) -> float:
    return math.sqrt(rank) if config.rslora else rank


def _alpha(scaling: float, divisor: float, config: LoRAConfig) -> float:
    """The alpha with alpha / divisor == scaling, or, where no float has that, the nearest (1 ulp)."""
    near = scaling * divisor
    candidates = (config.alpha, near, math.nextafter(near, 0.0), math.nextafter(near, math.inf))
    return next((alpha for alpha in candidates if alpha / divisor == scaling), near)


def _commonest(values: Mapping[str, float], preferred: float) -> float:
    if preferred in values.values():
        return preferred
    counts = Counter(values.values())
    return min(counts, key=lambda value: (-counts[value], value))


def _unambiguous_keys(paths: Iterable[str]) -> dict[str, str]:
    """Path → a pattern that matches it and no other one, in any order of the patterns."""
    paths = list(paths)
    endings = Counter(suffix for path in paths for suffix in suffixes(path))
    # PEFT puts `(.*\.)?` before a key; `^` undoes that where the path also ends another one
    return {path: ("^" if endings[path] > 1 else "") + re.escape(path) for path in paths}
