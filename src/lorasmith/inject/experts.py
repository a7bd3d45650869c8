"""LoRA on stacked 3-D parameters, (experts, …), which a module uses without calling a linear layer.

The class of the module gains a property of the parameter's name. While a forward runs, it gives
W0 + delta, formed once for that forward and differentiable with respect to the factors; outside of
one it gives W0. No parametrisation is registered, so names, parameters and files stay the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.inject.kinds import AdaptedLayer
from lorasmith.inject.layer import adapt_class, master_dtype
from lorasmith.lora import Adapter, Factors, Layout

EXPERT = Layout("expert")


class LoRAExperts(AdaptedLayer):
    """Holds `lora_A_<name>` (experts, rank, in) and `lora_B_<name>` (experts, out, rank) for each parameter."""

    lora_scalings: dict[str, float]
    lora_now: dict[str, Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base's class computes with the adapted parameters."""
        if not self.lora_is_active:
            return super().forward(*args, **kwargs)
        self.__dict__["lora_now"] = {name: self._adapted(name) for name in self.lora_scalings}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["lora_now"] = {}

    def _adapted(self, name: str) -> Tensor:
        W = self._parameters[name]
        assert W is not None
        A, B = self._pair(name)
        W_delta = torch.bmm(B * self.lora_scalings[name], A)
        return W + (W_delta.mT if stores_in_by_out(self) else W_delta).to(W.dtype)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        A, B = self._parameters[f"lora_A_{name}"], self._parameters[f"lora_B_{name}"]
        assert A is not None
        assert B is not None
        return A, B

    def expert_factors(self) -> dict[str, Factors]:
        """`<parameter>.<expert>` → its live factors."""
        return {
            f"{name}.{e}": Factors(A.data, B.data, scaling, EXPERT)
            for name, scaling in self.lora_scalings.items()
            for e, (A, B) in enumerate(zip(*self._pair(name), strict=True))
        }


def stores_in_by_out(module: nn.Module) -> bool:
    """Whether each expert's matrix is (in_features, out_features); the module says so, as for PEFT."""
    return bool(getattr(module, "is_transposed", False))


def expert_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(experts, in_features, out_features) of the stacked parameter `name`."""
    experts, rows, cols = module._parameters[name].shape  # type: ignore[union-attr]
    return (experts, rows, cols) if stores_in_by_out(module) else (experts, cols, rows)


def stacked_parameters(module: nn.Module) -> list[str]:
    """Names of a module's own 3-D parameters, in their order. Convolutions are layers, not stacks."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    return [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3 and not n.startswith("lora_")]


def attach_experts(module: nn.Module, by_name: Mapping[str, list[Factors]]) -> None:
    """Adapt the stacked parameters that `by_name` holds the factors of, one pair for each expert."""
    adapt_class(module, (*_properties(tuple(by_name)), LoRAExperts))
    module.__dict__["lora_scalings"] = {name: pairs[0].scaling for name, pairs in by_name.items()}
    module.__dict__["lora_now"] = {}
    for name, pairs in by_name.items():
        W = module._parameters[name]
        assert W is not None
        for part, stack in zip("AB", stack_factors(pairs, master_dtype(W)), strict=True):
            module.register_parameter(f"lora_{part}_{name}", nn.Parameter(stack.to(W.device)))


def stacks_by_module(adapter: Adapter) -> dict[str, dict[str, list[Factors]]]:
    """Module path → parameter name → the factors of its experts, in their order."""
    found: dict[str, dict[str, dict[int, Factors]]] = {}
    for path, factors in adapter.factors.items():
        if factors.layout.kind == "expert":
            owner, name, number = path.rsplit(".", 2)
            found.setdefault(owner, {}).setdefault(name, {})[int(number)] = factors
    return {
        owner: {name: [pairs[e] for e in sorted(pairs)] for name, pairs in stacks.items()}
        for owner, stacks in found.items()
    }


def stack_factors(pairs: list[Factors], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (experts, rank, in_features) and B (experts, out_features, rank); shorter ranks end in zeros."""
    rank = max(f.rank for f in pairs)
    A = torch.stack([F.pad(f.A.detach().to(dtype), (0, 0, 0, rank - f.rank)) for f in pairs])
    B = torch.stack([F.pad(f.B.detach().to(dtype), (0, rank - f.rank)) for f in pairs])
    return A, B


@cache
def _properties(names: tuple[str, ...]) -> tuple[type[AdaptedLayer], ...]:
    def reader(name: str) -> property:
        return property(lambda module: module.lora_now.get(name, module._parameters[name]))

    return (type("AdaptedParameters", (AdaptedLayer,), {name: reader(name) for name in names}),)


def merged_stack(module: nn.Module, W: Tensor, pairs: list[Factors]) -> Tensor:
    """W0 + delta of every expert, formed in at least float32 and rounded once."""
    wide = master_dtype(W)
    A, B = (stack.to(W.device) for stack in stack_factors(pairs, wide))
    W_delta = torch.bmm(B * pairs[0].scaling, A)
    return (W.to(wide) + (W_delta.mT if stores_in_by_out(module) else W_delta)).to(W.dtype)
