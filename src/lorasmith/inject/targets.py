"""From the `targets` of a config to modules: every name must find something, or it is an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from lorasmith.errors import TargetError, did_you_mean
from lorasmith.inject.experts import stacked_parameters
from lorasmith.inject.kinds import layer_shape, linear_shape, why_not
from lorasmith.lora import LoRAConfig, pattern_matches


@dataclass(frozen=True)
class Targets:
    """What a config names in a model.

    Attributes:
        chosen: path → layer that gets factors.
        left: path → linear layer that does not.
        stacks: path of a stacked parameter that gets factors → the module that holds it.
    """

    chosen: dict[str, nn.Module]
    left: dict[str, nn.Module]
    stacks: dict[str, nn.Module]


def resolve_targets(model: nn.Module, config: LoRAConfig) -> Targets:
    """Find the modules that `config` names, in the model's own order.

    Raises:
        TargetError: if any target, exclusion, layer number or pattern key matches nothing,
            or one matches a layer that cannot carry LoRA. All faults at once.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    layers = {path: module for path, module in modules.items() if _is_adaptable(modules, path)}
    linears = {path: module for path, module in layers.items() if linear_shape(module) is not None}
    faults = _Faults(type(model).__name__, linears)

    selected = _select(config.targets, "targets", modules, layers, faults, output_head(model))
    if config.exclude:
        excluded = _select(config.exclude, "exclude", modules, layers, faults, None)
        selected -= excluded
        if not selected and not faults.lines:
            faults.add(
                f"exclude={_shown(config.exclude)} leaves nothing of targets={_shown(config.targets)}."
            )
    if config.layers is not None:
        selected = _only_layers(selected, config.layers, faults)
    stacks = _select_stacks(modules, config.target_parameters, faults)
    for key in (*config.rank_pattern, *config.alpha_pattern, *config.parts):
        if not any(pattern_matches(key, path) for path in (*selected, *stacks)):
            faults.add(f'pattern key "{key}" matches no adapted module.')
    faults.raise_if_any()
    chosen = {path: module for path, module in layers.items() if path in selected}
    return Targets(chosen, {path: m for path, m in linears.items() if path not in chosen}, stacks)


def _select_stacks(
    modules: dict[str, nn.Module], entries: tuple[str, ...], faults: _Faults
) -> dict[str, nn.Module]:
    stacks = {f"{path}.{name}": m for path, m in modules.items() for name in stacked_parameters(m)}
    chosen: dict[str, nn.Module] = {}
    for path, module in stacks.items():
        if any(f".{path}".endswith(f".{entry}") for entry in entries):
            chosen[path] = module
    for entry in entries:
        if not any(f".{path}".endswith(f".{entry}") for path in chosen):
            there = " ".join(sorted({path.rpartition(".")[2] for path in stacks})) or "none"
            faults.add(f'target_parameters: "{entry}" matches no stacked parameter; here are: {there}.')
    return chosen


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, where the model says which it is."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def layer_number(path: str) -> int | None:
    """The first whole number in a module's path: 3 for `model.layers.3.mlp.up_proj`."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _is_adaptable(modules: dict[str, nn.Module], path: str) -> bool:
    module, parent = modules[path], modules.get(path.rpartition(".")[0])
    return layer_shape(module) is not None and why_not(module, parent) is None


def _select(
    targets: str | tuple[str, ...],
    what: str,
    modules: dict[str, nn.Module],
    layers: dict[str, nn.Module],
    faults: _Faults,
    head: nn.Module | None,
) -> set[str]:
    if targets == "all-linear":
        linears = {path: module for path, module in layers.items() if linear_shape(module) is not None}
        selected = {path for path, module in linears.items() if module is not head}
        if not selected:
            faults.add(f'{what}="all-linear" found no linear layer.')
        return selected
    entries = [targets] if isinstance(targets, str) else list(targets)
    selected = set()
    for entry in entries:
        matches = [path for path in modules if _matcher(targets, entry)(path)]
        refusals = _refusals(modules, matches)
        found = [path for path in matches if path in layers]
        if refusals and (what == "targets"):
            faults.add(f"{what}={_shown(targets)}: {refusals}")
        elif not found:
            faults.nothing_found(what, targets, entry)
        selected.update(found)
    return selected


def _matcher(targets: str | tuple[str, ...], entry: str) -> Callable[[str], bool]:
    if isinstance(targets, str):
        pattern = re.compile(entry)
        return lambda path: pattern.fullmatch(path) is not None
    return lambda path: path == entry or path.endswith("." + entry)


def _refusals(modules: dict[str, nn.Module], matches: Iterable[str]) -> str:
    for path in matches:
        reason = why_not(modules[path], modules.get(path.rpartition(".")[0]))
        if reason:
            return f"{path}: {reason}."
    return ""


def _only_layers(selected: set[str], layers: tuple[int, ...], faults: _Faults) -> set[str]:
    numbers = {path: layer_number(path) for path in selected}
    there = {n for n in numbers.values() if n is not None}
    missing = sorted(set(layers) - there)
    if missing and selected:
        span = f"{min(there)} to {max(there)}" if there else "none: these paths have no layer number"
        faults.add(f"layers {missing} match no adapted module; layers here: {span}.")
    return {path for path in selected if numbers[path] in layers}


def _shown(targets: str | tuple[str, ...]) -> str:
    return repr(targets) if isinstance(targets, str) else str(list(targets))


class _Faults:
    """Gathers every fault, then raises them as one error that lists what there is to choose from."""

    def __init__(self, model_name: str, linears: dict[str, nn.Module]) -> None:
        self.model_name = model_name
        self.last_parts = Counter(path.rpartition(".")[2] for path in linears)
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)

    def nothing_found(self, what: str, targets: str | tuple[str, ...], entry: str) -> None:
        shown = f"{what}={_shown(targets)}" + (
            "" if len(targets) == 1 or isinstance(targets, str) else f': "{entry}"'
        )
        self.add(f"{shown} matched no module in {self.model_name}.{self._suggestion(entry)}")

    def _suggestion(self, entry: str) -> str:
        hint = did_you_mean(entry.rpartition(".")[2], self.last_parts)
        if not hint:
            return ""
        name = hint.split('"')[1]
        return f"{hint[:-1]} ({self.last_parts[name]} modules)?"

    def raise_if_any(self) -> None:
        if not self.lines:
            return
        there = " ".join(sorted(self.last_parts)) or "none"
        raise TargetError("\n  ".join([*self.lines, f"linear layers here end in: {there}"]))
