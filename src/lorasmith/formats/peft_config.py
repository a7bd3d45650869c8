"""`adapter_config.json` → `FileConfig`: the one place where PEFT's settings are validated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.errors import ConfigError
from lorasmith.formats.peft_rules import PatternTable, TargetRules, pattern_regex, regex_fault
from lorasmith.lora import InitName, LoRAConfig

MAX_RANK = 65_536
_MAX_ENTRIES = 100_000  # of one list or pattern map

# settings that change the function in a way that cannot be applied yet → what each one is
_UNSUPPORTED = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "layer_replication": "repeated layers",
    "megatron_config": "Megatron parallel layers",
}
# these start training from other base weights than the ones on disk, so the factors fit only those
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_INITS: dict[object, InitName] = {True: "uniform", False: "uniform", None: "uniform", "gaussian": "normal"}
_OTHER_HARMLESS_INITS = ("eva", "orthogonal")  # A starts elsewhere; the trained function is the same
_READ = {
    *("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "bias"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "lora_dropout"),
    *("base_model_name_or_path", "fan_in_fan_out", "use_dora", "lora_bias", "modules_to_save"),
    *("trainable_token_indices", "target_parameters"),
}
# training only, or bookkeeping
_HARMLESS = {
    *("auto_mapping", "peft_version", "revision", "task_type", "inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size", "merge_weights", "ensure_weight_tying", "velora_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}


@dataclass(frozen=True)
class FileConfig:
    """What the file says, and PEFT's rules under it."""

    lora: LoRAConfig
    rules: TargetRules
    fan_in_fan_out: bool
    base_name: str | None
    rank_table: PatternTable
    alpha_table: PatternTable
    token_rows: Mapping[str, tuple[int, ...]]
    use_dora: bool = False

    def rank_of(self, path: str) -> int:
        """Rank that PEFT gives the module at `path`."""
        return int(self.rank_table.get(path, self.lora.rank))

    def scaling_of(self, path: str) -> float:
        """Multiplier that PEFT gives the module at `path`."""
        rank = self.rank_of(path)
        alpha = self.alpha_table.get(path, self.lora.alpha)
        return alpha / (math.sqrt(rank) if self.lora.rslora else rank)

    def is_whole(self, path: str) -> bool:
        """Whether `modules_to_save` names the module at `path` or one around it; PEFT compares the end only."""
        around = (path.rsplit(".", n)[0] for n in range(path.count(".") + 1))
        return any(module.endswith(self.lora.modules_to_save) for module in around)

    def stacked(self, path: str) -> list[str]:
        """Names of the bare parameters of the module at `path` that get factors, as the file lists them."""
        names = [(entry, entry.rpartition(".")[2]) for entry in self.lora.target_parameters]
        return [name for entry, name in names if f".{path}.{name}".endswith(f".{entry}")]

    def rows_of(self, path: str) -> tuple[int, ...]:
        """Token ids of the trained rows of the embedding at `path`; the key "" means any."""
        found = (ids for key, ids in self.token_rows.items() if path.endswith(key))
        return next(found, ())

    def regexes(self) -> list[str]:
        """Every regular expression in the file, as it will be run."""
        keys = [*self.lora.rank_pattern, *self.lora.alpha_pattern]
        return self.rules.regexes() + [pattern_regex(key) for key in keys]


def parse_config(
    values: Mapping[str, Any], faults: list[str], *, is_shifted: bool = False
) -> FileConfig | None:
    """Validate the settings of one file; with faults, say all of them and return nothing.

    Args:
        is_shifted: the caller makes up for a base that was changed before training.
    """
    found = [*_feature_faults(values, is_shifted), *_value_faults(values)]
    faults += found
    return None if found else _build(values, faults)


def _build(values: Mapping[str, Any], faults: list[str]) -> FileConfig | None:
    rules = TargetRules(
        _targets(values.get("target_modules") or ()),
        _targets(values.get("exclude_modules") or ()),
        _layers(values.get("layers_to_transform")),
        _names(values.get("layers_pattern") or ()),
    )
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    try:
        lora = LoRAConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            targets=rules.targets,
            exclude=rules.exclude,
            # a layers_pattern has no equal here: `read_header` writes the modules out in full
            layers=None if rules.layers_pattern else rules.layers,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            rslora=bool(values.get("use_rslora")),
            init=_INITS.get(values.get("init_lora_weights", True), "uniform"),
            dropout=values.get("lora_dropout") or 0.0,
            bias=values.get("bias") or "none",
            lora_bias=bool(values.get("lora_bias")),
            modules_to_save=_names(values.get("modules_to_save") or ()),
            target_parameters=_names(values.get("target_parameters") or ()),
        )
    except ConfigError as error:
        faults.append(str(error))
        return None
    return FileConfig(
        lora,
        rules,
        bool(values.get("fan_in_fan_out")),
        values.get("base_model_name_or_path"),
        PatternTable(ranks),
        PatternTable(alphas),
        _token_rows(values.get("trainable_token_indices")),
        bool(values.get("use_dora")),
    )


def _feature_faults(values: Mapping[str, Any], is_shifted: bool) -> list[str]:
    faults = []
    if (peft_type := values.get("peft_type")) != "LORA":
        faults.append(f'peft_type is {peft_type!r:.40}; only "LORA" can be read')
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        if not is_shifted:
            faults.append(
                f'init_lora_weights="{init:.40}" changed the base before training, so the factors are wrong on '
                "the original one. If the adapter was also saved before its first step, pass that folder as "
                "read_adapter(path, initial=folder); else convert it in PEFT "
                "(path_initial_model_for_weight_conversion)"
            )
    elif not (init is None or type(init) is bool or init in ("gaussian", *_OTHER_HARMLESS_INITS)):
        faults.append(f"init_lora_weights={init!r:.40} is unknown")
    for key in sorted(values):
        if key in _UNSUPPORTED and values[key]:
            faults.append(f"{key}={values[key]!r:.60} ({_UNSUPPORTED[key]}) cannot be applied yet")
        elif key not in _READ | _HARMLESS | _UNSUPPORTED.keys() and values[key]:
            faults.append(
                f"{key!r:.60}={values[key]!r:.60} is unknown and could change what the adapter does"
            )
    return faults


def _value_faults(values: Mapping[str, Any]) -> list[str]:
    has_others = any(
        values.get(k) for k in ("target_parameters", "modules_to_save", "trainable_token_indices")
    )
    checks: list[tuple[str, Callable[[Any], bool], str]] = [
        ("r", _is_rank, f"a whole number from 1 to {MAX_RANK:,}"),
        ("lora_alpha", _is_positive, "a positive number"),
        (
            "target_modules",
            lambda v: _is_targets(v) or (not v and has_others),
            "a non-empty list of module names or one regular expression",
        ),
        ("modules_to_save", lambda v: not v or (_is_targets(v) and type(v) is list), "a list of names"),
        ("target_parameters", lambda v: not v or (_is_targets(v) and type(v) is list), "a list of names"),
        ("trainable_token_indices", _is_rows, "a list of token ids, or a map from name to such a list"),
        ("use_dora", _is_flag, "true or false"),
        ("lora_bias", _is_flag, "true or false"),
        ("exclude_modules", lambda v: not v or _is_targets(v), "a list of names or one regular expression"),
        ("layers_to_transform", _is_layers, "a whole number or a list of them"),
        ("layers_pattern", lambda v: not v or _is_targets(v), "a name or a list of names"),
        ("rank_pattern", lambda v: _is_map(v, _is_rank), f"a map from name to 1 … {MAX_RANK:,}"),
        ("alpha_pattern", lambda v: _is_map(v, _is_positive), "a map from name to a positive number"),
        ("use_rslora", _is_flag, "true or false"),
        ("fan_in_fan_out", _is_flag, "true or false"),
        ("lora_dropout", lambda v: v is None or v == 0 or (_is_positive(v) and v < 1), "from 0 to below 1"),
        ("bias", lambda v: v in (None, "none", "lora_only", "all"), 'one of "none", "lora_only", "all"'),
        ("base_model_name_or_path", lambda v: v is None or isinstance(v, str), "a name"),
    ]
    faults = []
    for key, accept, use in checks:
        if not accept(values.get(key)):
            given = f"is {values[key]!r:.80}" if key in values else "is missing"
            faults.append(f"{key} {given}; it must be {use}")
    return faults + _regex_faults(values)


def _regex_faults(values: Mapping[str, Any]) -> list[str]:
    """Judge every regular expression before anything compiles it."""
    wholes = [(key, values.get(key)) for key in ("target_modules", "exclude_modules")]
    named = [(key, v, v) for key, v in wholes if isinstance(v, str)]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(key)
        if isinstance(patterns, dict):
            named += [(f"{key} key", k, pattern_regex(k)) for k in patterns]
    layers = values.get("layers_pattern")
    if layers and _is_targets(layers):
        named += [("layers_pattern", p, p) for p in _names(layers)]
    judged = [(name, given, regex_fault(regex)) for name, given, regex in named]
    return [f"{name} {given!r:.80} is refused: {why}" for name, given, why in judged if why]


def _targets(value: str | list[str] | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value.lower() if value.lower() == "all-linear" else value
    return tuple(sorted(set(value)))


def _names(value: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _token_rows(value: list[int] | dict[str, list[int]] | None) -> dict[str, tuple[int, ...]]:
    if not value:
        return {}
    return {"": tuple(value)} if isinstance(value, list) else {k: tuple(v) for k, v in value.items()}


def _layers(value: int | list[int] | None) -> tuple[int, ...] | None:
    return (value,) if isinstance(value, int) else tuple(sorted(set(value))) if value else None


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_positive(value: object) -> bool:
    # 1e30 is far beyond sense, and keeps alpha / rank finite
    return type(value) in (int, float) and 0 < value < 1e30  # type: ignore[operator]


def _is_flag(value: object) -> bool:
    return value is None or type(value) is bool


def _is_targets(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    return (
        isinstance(value, list)
        and 0 < len(value) <= _MAX_ENTRIES
        and all(type(v) is str and v for v in value)
    )


def _is_rows(value: object) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value] if value else []
    return len(lists) <= _MAX_ENTRIES and all(
        type(ids) is list and ids and _is_layers(ids) and len(set(ids)) == len(ids) for ids in lists
    )


def _is_layers(value: object) -> bool:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return len(values) <= _MAX_ENTRIES and all(type(v) is int and 0 <= v < 2**31 for v in values)


def _is_map(value: object, accept: Callable[[object], bool]) -> bool:
    return value is None or (
        isinstance(value, dict) and len(value) <= _MAX_ENTRIES and all(accept(v) for v in value.values())
    )
