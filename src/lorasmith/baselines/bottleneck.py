"""Bottleneck adapters: a small network in the path of the hidden states, h ← h + W_up σ(W_down h + b_d) + b_u."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lorasmith.baselines.anatomy import decoder_layers, norm_parameters, sublayers, width_of
from lorasmith.baselines.weights import OwnWeights

INIT_STD = 1e-3
"""Of both products, cut at two deviations: google-research/adapter-bert, `feedforward_adapter`."""
CHILD = "bottleneck"


class BottleneckAdapter(nn.Module):
    """h + W_up σ(W_down norm(h) + b_d) + b_u; float32 parameters, computed in the dtype of h.

    Args:
        width: of h. bottleneck: rows of W_down.
        activation: σ.
        normed: a LayerNorm of its own before W_down.
    """

    def __init__(
        self, width: int, bottleneck: int, activation: Callable[[Tensor], Tensor], *, normed: bool
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if normed else None
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.activation = activation

    def initialise(self, generator: torch.Generator) -> None:
        """Near the identity: tiny products, zero biases."""
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(
                linear.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD, generator=generator
            )
            nn.init.zeros_(linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        """(…, width) to (…, width)."""
        z = h
        if self.norm is not None:
            weight, bias = (t.to(h.dtype) for t in (self.norm.weight, self.norm.bias))
            z = F.layer_norm(h, self.norm.normalized_shape, weight, bias, self.norm.eps)
        z = self.activation(_product(self.down, z))
        return h + _product(self.up, z)


class Bottleneck(OwnWeights):
    """Adapters that hang on modules of the model as children, and change their outputs by hooks.

    A hook sees each position alone, so a key-value cache, packing and masks work as without it.
    """

    def _add(self, model: nn.Module, generator: torch.Generator) -> str:
        self._hooks: list[RemovableHandle] = []
        self._owners: list[nn.Module] = []
        for module in self._places(model):
            weight = next(module.parameters())
            adapter = self._adapter(width_of(model)).to(weight.device)
            adapter.initialise(generator)
            module.add_module(CHILD, adapter)
            self._owners.append(module)
            self._hooks.append(module.register_forward_hook(_through))
        self._train(self._also_trained(model))
        return self._said()

    @abstractmethod
    def _places(self, model: nn.Module) -> list[nn.Module]:
        """Modules whose outputs pass through an adapter."""

    @abstractmethod
    def _adapter(self, width: int) -> BottleneckAdapter:
        """A new one, for a stream of this width."""

    def _also_trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {}

    def _said(self) -> str:
        return f"{len(self._owners)} bottleneck adapters of {self.options['bottleneck']}"

    def detach(self, model: nn.Module) -> None:
        """Hooks and adapters gone, norms as they were."""
        for hook in self._hooks:
            hook.remove()
        for module in self._owners:
            delattr(module, CHILD)
        self._hooks, self._owners = [], []
        super().detach(model)


class Houlsby(Bottleneck):
    """On what attention and MLP give, before each residual; GELU; the norms train too."""

    name = "houlsby"

    def _places(self, model: nn.Module) -> list[nn.Module]:
        layers = decoder_layers(model).values()
        return [part for layer in layers for part in sublayers(layer)]

    def _adapter(self, width: int) -> BottleneckAdapter:
        return BottleneckAdapter(width, self.options["bottleneck"], _gelu, normed=False)

    def _also_trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in norm_parameters(model).items() if CHILD not in n.split(".")}

    def _said(self) -> str:
        return super()._said() + ", two a decoder layer, and every norm"


class Lin(Bottleneck):
    """On the output of each decoder layer, through a LayerNorm of its own; ReLU."""

    name = "lin"

    def _places(self, model: nn.Module) -> list[nn.Module]:
        return list(decoder_layers(model).values())

    def _adapter(self, width: int) -> BottleneckAdapter:
        return BottleneckAdapter(width, self.options["bottleneck"], torch.relu, normed=True)

    def _said(self) -> str:
        return super()._said() + ", one a decoder layer"


def _through(module: nn.Module, inputs: Any, output: Any) -> Any:
    adapter: nn.Module = getattr(module, CHILD)
    if isinstance(output, tuple):  # attention also returns its weights
        return (adapter(output[0]), *output[1:])
    return adapter(output)


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
