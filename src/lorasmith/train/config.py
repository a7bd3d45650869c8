"""`TrainConfig`: how an adapter is trained. Every default carries its reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from lorasmith.baselines import MethodOptions, option_faults
from lorasmith.errors import ConfigError, did_you_mean

PackingName = Literal["auto", "none", "plain", "tree"]
ScheduleName = Literal["linear", "constant", "cosine"]
MethodName = Literal["lora", "full", "houlsby", "lin", "prefix", "prompt", "bitfit", "top-k", "intrinsic"]
KernelsName = Literal["auto", "block", "inductor", "plain"]
RecomputeName = Literal["auto", "none", "mlp", "layers"]
OffloadName = Literal["none", "activations", "weights", "all"]
ShardName = Literal["none", "base", "all"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Args:
        method: `"lora"`, or one of those it was compared with, `"full"` fine-tuning of every weight among
            them, through the same loop (see `baselines`).
        options: settings of that method; LoRA's are in `LoRAConfig`.
        lr: peak learning rate; None derives it from the model's width (`default_lr`).
        epochs: passes over the data.
        max_steps: stop after this many optimizer steps, however many epochs that is.
        batch_size: sequences per optimizer step.
        batch_tokens: tokens in one forward pass; larger steps are accumulated.
        shuffle: a new order each epoch; else the order of the data.
        max_length: tokens per sequence; longer prompts lose their beginning.
        warmup: share of the steps with a rising learning rate.
        schedule: what follows: linear to zero, cosine to zero, or constant.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: largest norm of the whole gradient.
        label_smoothing: share of the target spread over the vocabulary.
        packing: how sequences share a forward pass; `"auto"` takes what computes the fewest slots.
        kernels: how layers are computed; `"auto"` takes the fastest that fits (see `policy`).
        recompute: what is computed again in the backward pass instead of kept: `"none"`, `"mlp"` (gate and
            up), `"layers"`; `"auto"` keeps what fits the budget.
        budget_bytes: largest peak of the process's memory; decides `recompute` and lowers `batch_tokens`.
        offload: what waits outside of memory until it is used, for the time that takes: `"none"`,
            `"activations"` (in a file in the cache folder; of a GPU in the machine's memory), `"weights"`
            (each layer's, which are pages of the base's file) or `"all"`. The result is the same to the bit.
        shard: under torchrun, what is spread over the processes: `"none"`; the frozen `"base"`; or `"all"`, what
            trains and the optimizer's moments too (for `"lora"` and `"full"`). The base stays so after the run.
        eval_every: optimizer steps between evaluations; None is five times a run.
        save_every: optimizer steps between checkpoints; None is ten times a run.
        seed: of the factors, the data order and dropout.
    """

    method: MethodName = "lora"
    options: MethodOptions = field(default_factory=MethodOptions)
    lr: float | None = None
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    batch_tokens: int = 2048
    max_length: int = 1024
    shuffle: bool = True
    warmup: float = 0.04
    schedule: ScheduleName = "linear"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    label_smoothing: float = 0.0
    packing: PackingName = "auto"
    kernels: KernelsName = "auto"
    recompute: RecomputeName = "auto"
    budget_bytes: int | None = None
    offload: OffloadName = "none"
    shard: ShardName = "none"
    eval_every: int | None = None
    save_every: int | None = None
    seed: int = 0

    @property
    def keeps_activations(self) -> bool:
        """In memory, until their backward pass."""
        return self.offload in ("none", "weights")

    @property
    def keeps_weights(self) -> bool:
        """In memory, between the times that they compute."""
        return self.offload in ("none", "activations")

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.options, Mapping):
            object.__setattr__(self, "options", MethodOptions.from_dict(self.options))
        faults = list(_faults(self))
        if faults:
            raise ConfigError("TrainConfig cannot be used:\n  " + "\n  ".join(faults))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if not values.pop("options").given:
            return values | {"betas": list(self.betas)}
        return values | {"betas": list(self.betas), "options": self.options.given}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from plain values.

        Raises:
            ConfigError: for a key that is not a setting, with the nearest one that is.
        """
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            lines = [f'"{key}" is not a setting.{did_you_mean(key, known)}' for key in unknown]
            raise ConfigError("TrainConfig:\n  " + "\n  ".join(lines) + f"\n  settings: {', '.join(known)}")
        return cls(**values)

    def resolved(self, *, width: int) -> TrainConfig:
        """The same settings with the learning rate filled in."""
        return self if self.lr is not None else replace(self, lr=default_lr(width, self.method))

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `total`."""
        assert self.lr is not None
        rising = max(1, math.ceil(self.warmup * total)) if self.warmup else 0
        if step < rising:
            return self.lr * (step + 1) / rising
        left = (total - step) / max(1, total - rising)
        if self.schedule == "constant":
            return self.lr
        return self.lr * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def reasons(self, *, width: int) -> dict[str, str]:
        """Why each setting that was left at its default is what it is."""
        known = {
            "lr": f"1e-3 · √(576 / width {width})"
            + (f" · {RATES[self.method]:g} for {self.method}" if self.method != "lora" else "")
            + "; measured at width 576, and theory lets it fall as width^-1/2 under alpha/rank scaling",
            "batch_size": "LoRA tolerates large batches less than full fine-tuning does; 8-32 suit it",
            "schedule": "a short warm-up, then to zero: the last steps average the noise away",
            "weight_decay": "sweeps of adapters choose none",
        }
        return {
            name: reason for name, reason in known.items() if getattr(self, name) == getattr(DEFAULTS, name)
        }


RATES: Mapping[str, float] = {
    "lora": 1, "full": 0.1, "top-k": 0.1, "houlsby": 1, "lin": 1, "bitfit": 3,
    "prefix": 1, "prompt": 10, "intrinsic": 10,
}  # fmt: skip
"""Of each method, in LoRA's rates."""


def default_lr(width: int, method: MethodName = "lora") -> float:
    """1e-3 · √(576 / width) for LoRA, a tenth of that for full fine-tuning; others by `RATES`.

    Between the two published fits (exponents 0.08 and 0.78) stands the theory's −1/2 under
    alpha/rank scaling; 1e-3 at width 576 is measured. LoRA's best rate is about ten times
    that of full fine-tuning, at any rank.
    """
    return float(f"{1e-3 * math.sqrt(576 / width) * RATES[method]:.2g}")


def _faults(c: TrainConfig) -> Iterable[str]:
    counts = ("epochs", "batch_size", "batch_tokens", "max_length")
    optional = tuple(
        n for n in ("max_steps", "eval_every", "save_every", "budget_bytes") if getattr(c, n) is not None
    )
    for name in (*counts, *optional):
        if not _is_count(getattr(c, name)):
            yield f"{name}={getattr(c, name)!r}: use a whole number of at least 1"
    if c.lr is not None and not _between(c.lr, 0, 10, ends=False):
        yield f"lr={c.lr!r}: use a positive number, such as 1e-3, or leave it out"
    for name in ("warmup", "label_smoothing"):
        if not _between(getattr(c, name), 0, 1, ends=True) or getattr(c, name) == 1:
            yield f"{name}={getattr(c, name)!r}: use at least 0 and below 1"
    if not _between(c.weight_decay, 0, 10, ends=True):
        yield f"weight_decay={c.weight_decay!r}: use 0 or a small positive number"
    if not _between(c.clip, 0, math.inf, ends=False):
        yield f"clip={c.clip!r}: use a positive number; 1.0 is the default"
    if len(c.betas) != 2 or not all(_between(b, 0, 1, ends=True) and b < 1 for b in c.betas):
        yield f"betas={c.betas!r}: use two numbers of at least 0 and below 1"
    if not isinstance(c.seed, int) or c.seed < 0:
        yield f"seed={c.seed!r}: use a whole number from 0"
    if c.shard != "none" and c.offload != "none":
        yield f"offload={c.offload!r} and shard={c.shard!r} would both move the same weights: leave one of them out"
    for name, choices in _CHOICES.items():
        if getattr(c, name) not in get_args(choices):
            yield f"{name}={getattr(c, name)!r}: use one of {', '.join(get_args(choices))}"
    if c.method in get_args(MethodName):
        yield from option_faults(c.method, c.options)


_CHOICES: dict[str, Any] = {
    "packing": PackingName,
    "schedule": ScheduleName,
    "method": MethodName,
    "kernels": KernelsName,
    "recompute": RecomputeName,
    "offload": OffloadName,
    "shard": ShardName,
}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _between(value: object, low: float, high: float, *, ends: bool) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        return False
    return low <= value <= high if ends else low < value < high


DEFAULTS = TrainConfig()
