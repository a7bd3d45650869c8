"""Layers that receive the very same tensor (q, k, v; gate, up) computed together.

A probe forward finds them, whatever the architecture: the first one called computes all outputs
of its group, its siblings return their part for that same input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.inject.layer import LoRALayer, lora_outputs


class SharedInputGroup:
    """Layers with one input. Holds the siblings' outputs from the first call until each is taken."""

    def __init__(self, layers: list[LoRALayer]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._state: tuple[object, ...] = ()
        self._waiting: dict[int, Tensor] = {}

    def output_of(self, layer: LoRALayer, x: Tensor) -> Tensor:
        """Output of `layer` for `x`; computes the whole group unless this very x was just seen."""
        if x.is_inference():  # it keeps no version, so a change in place could not be told
            return lora_outputs([layer], x)[0]
        state = self._state_of(x)
        if self._input is not x or self._state != state or id(layer) not in self._waiting:
            self._compute(x, state)
        y = self._waiting.pop(id(layer))
        if not self._waiting:
            self._input, self._state = None, ()
        return y

    def _compute(self, x: Tensor, state: tuple[object, ...]) -> None:
        outputs = lora_outputs(self.layers, x)
        self._waiting = {id(layer): y for layer, y in zip(self.layers, outputs, strict=True)}
        self._input, self._state = x, state

    def _state_of(self, x: Tensor) -> tuple[object, ...]:
        """All that the outputs depend on besides the identity of x."""
        state: list[object] = [x._version, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)]
        for layer in self.layers:
            state += [layer.training, layer.lora_scaling]
            # a quantised weight is no parameter, and never changes
            weight = layer._parameters.get("weight")
            for tensor in (weight, layer.lora_A, layer.lora_B):
                if tensor is None:
                    continue
                state += [_Same(tensor), -1 if tensor.is_inference() else tensor._version]
        return tuple(state)


class _Same:
    """Equal only to itself around the same tensor; holds it, so that its id is not given away."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor

    __hash__ = None  # type: ignore[assignment]


def group_shared_inputs(model: nn.Module, probe: Callable[[], Any]) -> list[list[str]]:
    """Run `probe` (one forward pass of `model`) and group the LoRA layers that share an input.

    Args:
        probe: calls the model once on any valid input; its result is ignored.

    Returns:
        Module paths of each group of two or more.
    """
    ungroup(model)
    paths = {module: path for path, module in model.named_modules() if isinstance(module, LoRALayer)}
    seen: list[tuple[Tensor, list[LoRALayer]]] = []

    def observe(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, LoRALayer)
        sharing = next((layers for x, layers in seen[-4:] if x is args[0]), None)
        if sharing is None:
            seen.append((args[0], [layer]))
        elif layer not in sharing:
            sharing.append(layer)

    handles = [layer.register_forward_pre_hook(observe) for layer in paths]
    try:
        with torch.no_grad():
            probe()
    finally:
        for handle in handles:
            handle.remove()
    groups = [layers for _, layers in seen if len(layers) > 1 and all(la.lora_is_plain for la in layers)]
    calls = [layer for _, layers in seen for layer in layers]
    groups = [g for g in groups if all(calls.count(layer) == 1 for layer in g)]
    for layers in groups:
        group = SharedInputGroup(layers)
        for layer in layers:
            layer.lora_group = group
    return [[paths[layer] for layer in layers] for layers in groups]


def ungroup(model: nn.Module) -> None:
    """Let every LoRA layer compute alone again."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.lora_group = None
