"""`LoRAConfig`: everything that decides which adapter is made, validated when it is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, get_args

from lorasmith.errors import ConfigError, did_you_mean

BiasMode = Literal["none", "lora_only", "all"]
InitName = Literal["normal", "uniform"]


@dataclass(frozen=True)
class LoRAConfig:
    """Which modules get which factors.

    Args:
        rank: r, the inner dimension of B @ A.
        alpha: scaling is alpha / rank (with `rslora`, alpha / √rank; arXiv 2312.03732).
            A fixed alpha keeps the best learning rate nearly independent of the rank.
        targets: `"all-linear"` (every linear layer but the output head), a sequence of path
            suffixes (`"q_proj"`, `"self_attn.q_proj"`), or one regular expression that must match
            a module's whole path. The same three forms as PEFT's `target_modules`.
        exclude: as `targets`, taken away from them.
        layers: adapt only these layer numbers (the first whole number in a module's path).
        rank_pattern: path suffix or regular expression → rank, where it differs. First match wins.
        alpha_pattern: the same for alpha.
        rslora: rank-stabilised scaling.
        init: A ~ N(0, 1/(3·in_features)) or the uniform law of the same variance,
            U(-1/√in_features, 1/√in_features), as PEFT does. B is always zero.
        dropout: probability of zeroing an input element of the low-rank branch, in training only.
        bias: which of the base's biases train too: none, those of the targets, or all.
        lora_bias: a bias inside the factors too: y += scaling · (B(A(x)) + b).
        modules_to_save: path suffixes of modules whose own parameters train whole (a new head, norms).
        trainable_tokens: path suffix of an embedding → token ids whose rows train, and no other row.
        target_parameters: path suffixes of stacked 3-D parameters, (experts, …), that get factors for
            each expert, such as `"experts.gate_up_proj"`.
        parts: path suffix or regular expression of a fused layer → the output rows of each part that
            is adapted, such as `{"c_attn": [(0, 768), (1536, 2304)]}` for q and v of a fused q, k, v.
            Each part has an A and a B of its own, of this rank; other rows stay the base's.

    Raises:
        ConfigError: with every fault at once, and what to do about each.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    init: InitName = "normal"
    dropout: float = 0.0
    bias: BiasMode = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    parts: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._make_immutable()
        faults = list(_faults(self))
        if faults:
            raise ConfigError("LoRAConfig cannot be used:\n  " + "\n  ".join(faults))

    def _make_immutable(self) -> None:
        for name in ("targets", "exclude", "layers", "modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | tuple) and isinstance(value, Iterable):
                object.__setattr__(self, name, tuple(value))
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise ConfigError(f"{name}={patterns!r}: use a map from path suffix to number")
            object.__setattr__(self, name, {str(key): number for key, number in patterns.items()})
        for name in ("trainable_tokens", "parts"):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise ConfigError(f"{name}={patterns!r}: use a map from path suffix to a list")
            object.__setattr__(self, name, {str(key): _tuples(value) for key, value in patterns.items()})

    def rank_of(self, path: str) -> int:
        """Rank of the module at `path`."""
        return int(_first_match(self.rank_pattern, path, self.rank))

    def alpha_of(self, path: str) -> float:
        """Alpha of the module at `path`."""
        return float(_first_match(self.alpha_pattern, path, self.alpha))

    def scaling_of(self, path: str) -> float:
        """Multiplier of B @ A at `path`: alpha / rank, or alpha / √rank with rsLoRA."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)

    def parts_of(self, path: str) -> tuple[tuple[int, int], ...]:
        """Adapted output rows of each part of the module at `path`; empty where it is adapted whole."""
        return next((spans for key, spans in self.parts.items() if pattern_matches(key, path)), ())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """Build from plain values.

        Raises:
            ConfigError: for a key that is not a setting, with the nearest one that is.
        """
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            lines = [f'"{key}" is not a setting.{did_you_mean(key, known)}' for key in unknown]
            raise ConfigError("LoRAConfig:\n  " + "\n  ".join(lines) + f"\n  settings: {', '.join(known)}")
        return cls(**values)


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a `rank_pattern` key names `path`: PEFT's rule, the key ends the path at a dot."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    return tuple(map(_tuples, value)) if is_list else value


def _first_match(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((value for key, value in patterns.items() if pattern_matches(key, path)), default)


def _faults(c: LoRAConfig) -> Iterable[str]:
    yield from _number_faults(
        "rank", c.rank, _is_rank, "a whole number of at least 1; 8 or 16 suit most tasks"
    )
    yield from _number_faults("alpha", c.alpha, _is_positive, "a positive number; 32 is the default")
    yield from _number_faults("dropout", c.dropout, _is_share, "at least 0 and below 1; 0 is the default")
    for key, rank in c.rank_pattern.items():
        yield from _number_faults(f"rank_pattern[{key!r}]", rank, _is_rank, "a whole number of at least 1")
    for key, alpha in c.alpha_pattern.items():
        yield from _number_faults(f"alpha_pattern[{key!r}]", alpha, _is_positive, "a positive number")
    for name in ("targets", "exclude"):
        yield from _target_faults(name, getattr(c, name))
    if not (c.targets or c.target_parameters or c.modules_to_save or c.trainable_tokens):
        yield 'targets is empty, so nothing would be adapted: use "all-linear" or name modules'
    for name, value, choices in (("init", c.init, InitName), ("bias", c.bias, BiasMode)):
        if value not in get_args(choices):
            yield f"{name}={value!r} is unknown: use one of {', '.join(map(repr, get_args(choices)))}"
    if c.layers is not None and not all(_is_count(n) for n in c.layers):
        yield f"layers={c.layers!r}: use whole numbers from 0, such as range(8)"
    if c.layers is not None and len(c.layers) == 0:
        yield "layers is empty, so nothing would be adapted: leave it out to adapt every layer"
    for name in ("rslora", "lora_bias"):
        if getattr(c, name) not in (True, False):
            yield f"{name}={getattr(c, name)!r}: use true or false"
    for name in ("modules_to_save", "target_parameters"):
        value = getattr(c, name)
        if not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value):
            yield f"{name}={value!r}: use a list of path suffixes"
    yield from _extra_faults(c)


def _extra_faults(c: LoRAConfig) -> Iterable[str]:
    for key, ids in c.trainable_tokens.items():
        if not (isinstance(ids, tuple) and ids and all(map(_is_count, ids)) and len(set(ids)) == len(ids)):
            yield f"trainable_tokens[{key!r}]={ids!r}: use a list of different token ids"
    for key, spans in c.parts.items():
        if not (isinstance(spans, tuple) and spans and all(map(_is_span, spans))):
            yield f"parts[{key!r}]={spans!r}: use a list of (first row, row after the last)"
        elif any(a[1] > b[0] for a, b in pairwise(spans)):
            yield f"parts[{key!r}]={spans!r}: the parts must be in order and must not overlap"


def _number_faults(name: str, value: object, accept: Callable[[object], bool], use: str) -> Iterable[str]:
    if not accept(value):
        yield f"{name}={value!r}: use {use}"


def _target_faults(name: str, value: object) -> Iterable[str]:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            yield f"{name}={value!r} is not a regular expression ({error}); put suffixes in a list"
    elif not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value):
        yield f'{name}={value!r}: use a list of module names, one regular expression, or "all-linear"'


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_rank(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_span(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_count, value)) and value[0] < value[1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value < 1  # type: ignore[operator]
