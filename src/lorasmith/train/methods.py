"""Which `Method` a run trains; LoRA, the first of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lorasmith.baselines import Method, make_method
from lorasmith.errors import ConfigError
from lorasmith.formats import write_adapter
from lorasmith.inject import InjectReport, eject, extract, group_shared_inputs, inject, ungroup
from lorasmith.lora import Adapter, LoRAConfig
from lorasmith.quantised import Quantisation
from lorasmith.train.config import TrainConfig


class LoRA:
    """A low-rank term beside each target, the base frozen."""

    name = "lora"
    folder = "adapter"
    trains_base = False
    can_recompute = True

    def __init__(self, config: LoRAConfig) -> None:
        self.config = config

    def attach(self, model: nn.Module, *, seed: int) -> InjectReport:
        """See `Method`."""
        return inject(model, self.config, seed=seed)

    def prepare(self, model: nn.Module, probe: Callable[[], None]) -> None:
        """Let layers that share an input be computed together."""
        group_shared_inputs(model, probe)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The factors, and whatever else the config lets train."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def detach(self, model: nn.Module) -> None:
        """See `Method`."""
        ungroup(model)
        eject(model)

    def write(self, base: Any, path: Path, provenance: dict[str, Any]) -> Adapter:
        """A directory in PEFT's format, and the sidecar."""
        adapter = extract(base.model)
        adapter.provenance = provenance
        write_adapter(adapter, path, base_name=base.name)
        return adapter


NEEDS_WEIGHTS = ("full", "top-k", "intrinsic")
"""Methods that change the base's own weights."""


def method_of(
    settings: TrainConfig, config: LoRAConfig, tokenizer: Any, *, quantised: Quantisation | None = None
) -> Method:
    """The method that the settings name.

    Args:
        quantised: what of the base is.

    Raises:
        ConfigError: it cannot be trained with these settings.
    """
    if quantised and (settings.method in NEEDS_WEIGHTS or settings.shard != "none"):
        raise ConfigError(
            f'The base is quantised ({quantised.kind}): its codes can neither be trained (method="{settings.method}") nor '
            f'spread over processes (shard="{settings.shard}"). Load it without --quantize, or use method="lora" with '
            'shard="none".'
        )
    if settings.method in NEEDS_WEIGHTS and not settings.keeps_weights:
        raise ConfigError(
            f'offload="{settings.offload}" reads frozen weights again from their file, and method="{settings.method}" '
            'changes them. Use method="lora", or offload="activations".'
        )
    if settings.method == "lora":
        return LoRA(config)
    if settings.shard == "base" or (settings.shard == "all" and settings.method != "full"):
        raise ConfigError(
            f'shard="{settings.shard}" was asked with method="{settings.method}", which may train the base or look '
            'into it. "base" is for method="lora", "all" for "lora" and "full"; with shard="none" every method trains '
            "on several processes."
        )
    method = make_method(settings.method, settings.options.resolved(settings.method), tokenizer)
    if not method.can_recompute and (settings.recompute in ("mlp", "layers") or settings.budget_bytes):
        raise ConfigError(
            f'Method "{settings.method}" keeps what its layers compute: use recompute="none", and no budget.'
        )
    return method
