"""`LoRALayer`: what a layer gains when LoRA is put on it; by itself, what a linear layer does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasmith.inject.autograd import PARTS, Segmented, Spec, lora_linears
from lorasmith.inject.bank import BankLayer, bank_parts
from lorasmith.inject.kinds import AdaptedLayer, LayerShape, is_conv1d, layer_shape, own_class
from lorasmith.lora import Factors, compute_dtype
from lorasmith.quantised import QuantisedLinear

if TYPE_CHECKING:
    from lorasmith.inject.groups import SharedInputGroup


class LoRALayer(AdaptedLayer):
    """Mixed into the class of a target: y = base(x) + scaling · B(A(dropout(x))).

    The module object, its weight and its path stay the same; `detach_from` undoes it.
    Other kinds of layer (`LoRAEmbedding`, `LoRAConv`, …) are classes of their own with their own
    `_add_to_base`; nothing about them is asked here.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float
    lora_group: SharedInputGroup | None

    def forward(self, x: Tensor) -> Tensor:
        """Adapted output, shape (…, out_features), in the base's dtype."""
        if not self.lora_is_active:
            return super().forward(x)  # type: ignore[no-any-return]
        if not self.lora_is_plain:
            return self._add_to_base(x)
        if self.lora_group is not None and not torch.compiler.is_compiling():
            return self.lora_group.output_of(self, x)
        return lora_outputs([self], x)[0]

    @property
    def lora_is_plain(self) -> bool:
        """Whether the base's forward is exactly a linear map, so that the lean path applies."""
        own = own_class(type(self)).forward
        return own in (nn.Linear.forward, QuantisedLinear.forward) or is_conv1d(self)

    def base_forward(self, x: Tensor) -> Tensor:
        """What the base's own class computes."""
        return super().forward(x)  # type: ignore[no-any-return]

    def _add_to_base(self, x: Tensor) -> Tensor:
        y = self.base_forward(x)
        wide = nn.functional.dropout(x, self.lora_dropout, self.training)
        u = nn.functional.linear(wide, self.lora_A.to(wide.dtype))
        return y + nn.functional.linear(u, self.lora_B.to(u.dtype) * self.lora_scaling).to(y.dtype)

    @property
    def factors(self) -> Factors:
        """The live factors: editing them in place edits the layer."""
        return Factors(self.lora_A.data, self.whole_B(), self.lora_scaling, shape_of(self).layout)

    def set_factors(self, factors: Factors) -> None:
        """Exchange the factors; ranks may differ."""
        for name, new in ((self.name_of_A, factors.A), (self.name_of_B, self.stored_B(factors.B))):
            old = self._parameters[name]
            assert old is not None
            new = new.detach().to(old.device, old.dtype, copy=True)
            setattr(self, name, nn.Parameter(new, old.requires_grad))
        self.lora_scaling = factors.scaling

    name_of_A, name_of_B = "lora_A", "lora_B"
    """Of the parameters that train."""

    def whole_B(self) -> Tensor:
        """B, with the zeros that `stored_B` leaves out."""
        return self.lora_B.data

    def stored_B(self, B: Tensor) -> Tensor:
        """What of B is a parameter: all of it, but where a kind of layer holds a part at zero."""
        return B


def lora_outputs(layers: list[LoRALayer], x: Tensor) -> tuple[Tensor, ...]:
    """Outputs of layers that share the input `x`, by one lean computation."""
    x, dtype = _autocast_input(x)
    spec, tensors = linear_parts(layers)
    if dtype is None:
        return lora_linears(x, spec, tensors)[: len(layers)]
    of_base = [k for k in range(len(tensors)) if k % PARTS < 2]
    tensors = [t.to(dtype) if k in of_base and t is not None else t for k, t in enumerate(tensors)]
    with torch.autocast(x.device.type, enabled=False):
        return lora_linears(x, spec, tensors)[: len(layers)]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` computes x @ Wᵀ + b, plus scaling · B(A(dropout(x))) if it is adapted, and nothing else."""
    if not isinstance(module, AdaptedLayer):
        return type(module) is nn.Linear or isinstance(module, QuantisedLinear)
    if isinstance(module, BankLayer):
        return own_class(type(module)) is nn.Linear or isinstance(module, QuantisedLinear)
    is_alone = type(module).__bases__ == (LoRALayer, own_class(type(module)))
    is_plain = isinstance(module, LoRALayer) and module.lora_is_active and module.lora_is_plain
    return is_alone and is_plain and isinstance(module, nn.Linear)


def linear_parts(layers: Sequence[nn.Module]) -> tuple[Spec | Segmented, list[Tensor | None]]:
    """What `lora_linears` needs of layers that share an input; a plain linear layer has no factors.

    A dropout seed is drawn where an adapted layer is in training mode.
    """
    if (
        bank := next((layer.lora_bank for layer in layers if isinstance(layer, BankLayer)), None)
    ) is not None:
        return bank_parts(bank, layers)
    adapted = [layer for layer in layers if isinstance(layer, LoRALayer)]
    dropout = adapted[0].lora_dropout if adapted and adapted[0].training else 0.0
    spec = Spec(
        scalings=tuple(getattr(layer, "lora_scaling", 0.0) for layer in layers),
        transposed=tuple(not isinstance(layer, nn.Linear) for layer in layers),
        dropout=dropout,
        seed=int(torch.randint(2**62, ()).item()) if dropout else 0,
        quantised=tuple(m if isinstance(m, QuantisedLinear) else None for m in layers),
    )
    names = ("bias", "lora_A", "lora_B")  # a quantised layer's weight is made when it is multiplied with
    weights = [layer._parameters.get("weight") for layer in layers]
    rest = [[getattr(layer, name, None) for name in names] for layer in layers]
    return spec, [t for W, others in zip(weights, rest, strict=True) for t in (W, *others)]


def _autocast_input(x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, None
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), dtype


def attach_to(
    module: nn.Module,
    factors: Factors,
    *,
    dropout: float,
    trainable: bool = True,
    mixins: tuple[type[LoRALayer], ...] = (LoRALayer,),
) -> LoRALayer:
    """Turn `module` into a `LoRALayer` of its own class, in place.

    The factors are copied to the module's device, in float32 (float64 over a float64 base).

    Args:
        mixins: the kind of LoRA layer, first what overrides.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    adapt_class(module, mixins)
    assert isinstance(module, LoRALayer)
    module.lora_group = None
    module.lora_scaling = factors.scaling
    module.lora_dropout = dropout
    for name, value in ((module.name_of_A, factors.A), (module.name_of_B, module.stored_B(factors.B))):
        value = value.detach().to(weight.device, master_dtype(weight), copy=True)
        module.register_parameter(name, nn.Parameter(value, trainable))
    return module


def adapt_class(module: nn.Module, mixins: tuple[type[AdaptedLayer], ...]) -> None:
    """Give `module` a class of its own kind with `mixins` before it."""
    module.__class__ = _adapted_class(type(module), mixins)  # type: ignore[arg-type]
    module.lora_is_active = True  # type: ignore[assignment]


def master_dtype(weight: Tensor) -> torch.dtype:
    """Of the factors over `weight`: float64 over float64, else float32."""
    return compute_dtype(weight.dtype) if weight.is_floating_point() else torch.float32


def detach_from(layer: AdaptedLayer) -> None:
    """Give the module its own class back and drop all that was added."""
    for store in (layer._parameters, layer._buffers, layer.__dict__):
        for name in [name for name in store if name.startswith("lora_")]:
            del store[name]
    layer.__class__ = own_class(type(layer))  # type: ignore[assignment]


def shape_of(layer: nn.Module) -> LayerShape:
    """in_features, out_features, orientation and layout of a layer that is known to be adaptable."""
    shape = layer_shape(layer)
    assert shape is not None
    return shape


@cache
def _adapted_class(base: Any, mixins: Any) -> type[AdaptedLayer]:
    return type(f"LoRA{base.__name__}", (*mixins, base), {"__module__": base.__module__})
