"""A grid in one line of text, and the runs that it stands for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from lorasmith.errors import ConfigError, did_you_mean
from lorasmith.lora import LoRAConfig
from lorasmith.train import TrainConfig

SHARED = ("method", "batch_tokens", "kernels", "recompute", "budget_bytes", "shard", "save_every")
"""Settings of the process, the same for all runs of a sweep."""
NOT_IN_A_SWEEP = ("bias", "lora_bias", "modules_to_save", "trainable_tokens", "target_parameters", "parts")
LORA_KEYS = (
    "rank", "alpha", "targets", "exclude", "layers", "rslora", "init", "dropout",
)  # fmt: skip
TRAIN_KEYS = tuple(f.name for f in fields(TrainConfig) if f.name not in (*SHARED, "betas", "eval_every"))
FLOATS = ("alpha", "dropout", "lr", "warmup", "weight_decay", "clip", "label_smoothing")
KEYS = (*LORA_KEYS, *TRAIN_KEYS, "data")


@dataclass(frozen=True)
class Point:
    """One run of a grid.

    Attributes:
        name: also its folder: `lr=0.001,rank=4`.
        varied: what the grid says of it.
    """

    name: str
    varied: Mapping[str, Any]
    lora: LoRAConfig
    train: TrainConfig

    @property
    def config(self) -> dict[str, Any]:
        """Every setting of this run, flat."""
        data = {"data": self.varied["data"]} if "data" in self.varied else {}
        return self.lora.to_dict() | self.train.to_dict() | data


def parse_grid(text: str) -> dict[str, list[Any]]:
    """Values of each key of `lr=5e-4,1e-3;rank=4,16`; a list within a value is joined by `+`.

    Raises:
        ConfigError: with every fault at once.
    """
    grid: dict[str, list[Any]] = {}
    faults = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        key, equals, values = (piece.strip() for piece in part.partition("="))
        found = [v.strip() for v in values.split(",")]
        if not equals or not key or not all(found):
            faults.append(f'"{part}" is not of the form key=value,value')
        elif key in grid:
            faults.append(f'"{key}" comes twice')
        elif key not in KEYS:
            faults.append(_unknown(key))
        else:
            grid[key] = [_value(key, v) for v in found]
            if len(set(map(str, grid[key]))) < len(found):
                faults.append(f'"{part}" names a value twice')
    if not grid and not faults:
        faults = ["it names no key"]
    if faults:
        raise ConfigError(
            f'--grid "{text}" cannot be used:\n  '
            + "\n  ".join(faults)
            + "\n  write it as 'lr=5e-4,1e-3;rank=4,16'; one run is made of each combination"
            + f"\n  keys: {', '.join(KEYS)}"
        )
    return grid


def points(
    grid: Mapping[str, Sequence[Any]],
    lora: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
) -> list[Point]:
    """The run of each combination, in the order of the grid.

    Args:
        lora, train: settings that all runs share.

    Raises:
        ConfigError: a combination is no valid configuration; all that are not are named.
    """
    made: list[Point] = []
    faults: dict[str, list[str]] = {}
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={_shown(value)}" for key, value in varied.items())
        try:
            made.append(_point(name, varied, lora or {}, train or {}))
        except ConfigError as error:
            faults.setdefault(str(error), []).append(name)
    if faults:
        lines = [f"{text}\n  in {', '.join(names)}" for text, names in faults.items()]
        raise ConfigError("The grid holds runs that cannot be; nothing was started.\n" + "\n".join(lines))
    if len({p.name for p in made}) < len(made):
        raise ConfigError("Two runs of the grid would get the same name; give their data files other names.")
    return made


def _point(name: str, varied: Mapping[str, Any], lora: Mapping[str, Any], train: Mapping[str, Any]) -> Point:
    config = LoRAConfig.from_dict({**lora, **{k: v for k, v in varied.items() if k in LORA_KEYS}})
    settings = TrainConfig.from_dict({**train, **{k: v for k, v in varied.items() if k in TRAIN_KEYS}})
    faults = list(_not_shared(config, settings))
    if faults:
        raise ConfigError("; ".join(faults) + ". Train it alone, by `lorasmith train`.")
    return Point(name, varied, config, settings)


def _not_shared(config: LoRAConfig, settings: TrainConfig) -> Iterator[str]:
    """Why this run cannot share its passes with others."""
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(LoRAConfig)
    }
    for name in NOT_IN_A_SWEEP:
        if getattr(config, name) != defaults[name]:
            yield f"{name}={getattr(config, name)!r}: a sweep trains factors of linear layers and nothing else"
    if settings.method != "lora":
        yield f"method={settings.method!r}: full fine-tuning changes the base that a sweep shares"
    if settings.budget_bytes is not None:
        yield "budget_bytes is settled for one adapter; for a sweep, give recompute and batch_tokens"
    if settings.shard != "none":
        yield f"shard={settings.shard!r}: the processes of a sweep keep different times, so none waits for another's weights"
    if settings.kernels == "inductor":
        yield "kernels='inductor' compiles layers for one adapter; use auto, block or plain"


def _value(key: str, text: str) -> Any:
    if key in ("targets", "exclude"):
        if text == "all-linear":
            return text
        return text[3:] if text.startswith("re:") else tuple(text.split("+"))
    if key == "layers":
        return tuple(int(n) if n.isdigit() else n for n in text.split("+"))
    if key in ("data", "init", "schedule", "packing"):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (float,) if key in FLOATS else (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _shown(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = f"{value:g}" if isinstance(value, float) else text
    text = text.rpartition("/")[2]  # of a data file its name
    return re.sub(r"[^\w.+=-]", "_", text)


def _unknown(key: str) -> str:
    if key in SHARED or key == "eval_every":
        return f'"{key}" is one for all runs: give it outside the grid'
    if key in NOT_IN_A_SWEEP:
        return f'"{key}" cannot be swept: a sweep trains factors of linear layers and nothing else'
    return f'"{key}" is not a setting.{did_you_mean(key, KEYS)}'
