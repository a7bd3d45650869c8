"""`LoRALayer`: what a linear layer gains when LoRA is put on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasmith.inject.autograd import PARTS, Spec, lora_linears
from lorasmith.inject.kinds import LinearShape, is_conv1d, linear_shape
from lorasmith.lora import Factors, compute_dtype

if TYPE_CHECKING:
    from lorasmith.inject.groups import SharedInputGroup


class LoRALayer(nn.Module):
    """Mixed into the class of a target: y = base(x) + scaling · B(A(dropout(x))).

    The module object, its weight and its path stay the same; `detach_from` undoes it.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float
    lora_is_active: bool
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
        return _own_class(self).forward is nn.Linear.forward or is_conv1d(self)

    def _add_to_base(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        wide = nn.functional.dropout(x, self.lora_dropout, self.training)
        u = nn.functional.linear(wide, self.lora_A.to(wide.dtype))
        return y + nn.functional.linear(u, self.lora_B.to(u.dtype) * self.lora_scaling).to(y.dtype)

    @property
    def factors(self) -> Factors:
        """The live factors: editing them in place edits the layer."""
        return Factors(self.lora_A.data, self.lora_B.data, self.lora_scaling)

    def set_factors(self, factors: Factors) -> None:
        """Exchange the factors; ranks may differ."""
        for name, new in (("lora_A", factors.A), ("lora_B", factors.B)):
            old = getattr(self, name)
            new = new.detach().to(old.device, old.dtype, copy=True)
            setattr(self, name, nn.Parameter(new, old.requires_grad))
        self.lora_scaling = factors.scaling


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


def linear_parts(layers: Sequence[nn.Module]) -> tuple[Spec, list[Tensor | None]]:
    """What `lora_linears` needs of layers that share an input; a plain linear layer has no factors.

    A dropout seed is drawn where an adapted layer is in training mode.
    """
    adapted = [layer for layer in layers if isinstance(layer, LoRALayer)]
    dropout = adapted[0].lora_dropout if adapted and adapted[0].training else 0.0
    spec = Spec(
        scalings=tuple(getattr(layer, "lora_scaling", 0.0) for layer in layers),
        transposed=tuple(not isinstance(layer, nn.Linear) for layer in layers),
        dropout=dropout,
        seed=int(torch.randint(2**62, ()).item()) if dropout else 0,
    )
    names = ("weight", "bias", "lora_A", "lora_B")
    return spec, [getattr(layer, name, None) for layer in layers for name in names]


def _autocast_input(x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, None
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), dtype


def attach_to(module: nn.Module, factors: Factors, *, dropout: float, trainable: bool = True) -> LoRALayer:
    """Turn `module` into a `LoRALayer` of its own class, in place.

    The factors are copied to the module's device, in float32 (float64 over a float64 base).
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    dtype = compute_dtype(weight.dtype) if weight.is_floating_point() else torch.float32
    module.__class__ = _lora_class(type(module))  # type: ignore[arg-type]
    assert isinstance(module, LoRALayer)
    module.lora_A = nn.Parameter(factors.A.detach().to(weight.device, dtype, copy=True), trainable)
    module.lora_B = nn.Parameter(factors.B.detach().to(weight.device, dtype, copy=True), trainable)
    module.lora_scaling = factors.scaling
    module.lora_dropout = dropout
    module.lora_is_active = True
    module.lora_group = None
    return module


def detach_from(layer: LoRALayer) -> None:
    """Give the module its own class back and drop the factors."""
    for name in ("lora_A", "lora_B"):
        delattr(layer, name)
    for name in ("lora_scaling", "lora_dropout", "lora_is_active", "lora_group"):
        layer.__dict__.pop(name, None)
    layer.__class__ = _own_class(layer)  # type: ignore[assignment]


def shape_of(layer: nn.Module) -> LinearShape:
    """in_features, out_features and orientation of a layer that is known to be linear."""
    shape = linear_shape(layer)
    assert shape is not None
    return shape


def _own_class(layer: LoRALayer) -> type[nn.Module]:
    base = type(layer).__mro__[2]
    assert issubclass(base, nn.Module)
    return base


@cache
def _lora_class(base: Any) -> type[LoRALayer]:
    return type(f"LoRA{base.__name__}", (LoRALayer, base), {"__module__": base.__module__})
