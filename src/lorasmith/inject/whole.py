"""Whole trained weights (PEFT's `modules_to_save`): the parameter object is exchanged, so ties are never overwritten."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lorasmith.errors import TargetError
from lorasmith.lora import LoRAConfig


def exchange_weights(
    model: nn.Module, weights: Mapping[str, Tensor], adapted: Collection[str]
) -> dict[str, nn.Parameter]:
    """Put `weights` in the place of the model's parameters; return the ones that were there, by name.

    A trained weight takes only the place that it names: what was tied to it keeps the base's.
    The weight of an adapted module is PEFT's copy of the base's own (`save_embedding_layers`), so it
    does not train, and takes every place that it is tied to.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    replaced: dict[str, nn.Parameter] = {}
    for name, value in weights.items():
        own = named[name]
        is_copy = name.rpartition(".")[0] in adapted
        if is_copy and torch.equal(own.data, value.to(own.device, own.dtype)):
            replaced[name] = own
            continue
        new = nn.Parameter(value.detach().to(own.device, own.dtype, copy=True), requires_grad=not is_copy)
        for place in [n for n, p in named.items() if p is own] if is_copy else [name]:
            replaced[place] = own
            put_parameter(model, place, new)
    return replaced


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make `parameter` the one called `name`."""
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._parameters[last] = parameter


def weight_faults(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Which of `weights` have no place of their shape in `model`."""
    named = dict(model.named_parameters(remove_duplicate=False))
    faults = []
    for name, value in weights.items():
        if name not in named:
            faults.append(f"{name}: no such parameter in the model")
        elif named[name].shape != value.shape:
            faults.append(f"{name}: adapter {tuple(value.shape)}, model {tuple(named[name].shape)}")
    return faults


def weights_to_train(model: nn.Module, config: LoRAConfig, adapted: Collection[str]) -> dict[str, Tensor]:
    """Copies of all parameters under the modules that `modules_to_save` names.

    Raises:
        TargetError: a name that matches no module, or one inside which LoRA is put too.
    """
    paths = [path for path, _ in model.named_modules()]
    chosen: dict[str, Tensor] = {}
    for entry in config.modules_to_save:
        found = [p for p in paths if p == entry or p.endswith("." + entry)]
        inside = sorted(p for p in adapted for f in found if p == f or p.startswith(f + "."))
        if not found:
            raise TargetError(f'modules_to_save: "{entry}" matches no module in {type(model).__name__}.')
        if inside:
            raise TargetError(
                f'modules_to_save: "{entry}" holds {inside[0]}, which also gets factors. Leave it out of one of them.'
            )
        for path in found:
            for name, p in model.get_submodule(path).named_parameters(remove_duplicate=False):
                chosen[f"{path}.{name}"] = p.detach().clone()
    return chosen
