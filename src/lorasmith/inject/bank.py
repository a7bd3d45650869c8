"""Many adapters on one model at once; each row of a batch is computed under one of them.

The layers hold no factors. They ask the `Bank` which rows belong to whom, so that one call of the model
serves adapters of any ranks and targets. Outside `Bank.rows` the model is its own base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorasmith.inject.autograd import Segmented, Spec, lora_linears
from lorasmith.inject.kinds import AdaptedLayer, linear_shape
from lorasmith.lora import Factors
from lorasmith.quantised import QuantisedLinear


@dataclass(frozen=True)
class Tenant:
    """One adapter of a bank.

    Attributes:
        factors: module path → its pair; the tensors are those that train.
        random: draws the seeds of its dropout masks.
    """

    factors: Mapping[str, Factors]
    dropout: float = 0.0
    random: torch.Generator = field(default_factory=torch.Generator)


class BankLayer(AdaptedLayer):
    """Mixed into the class of a linear layer that some adapter of a bank targets."""

    lora_bank: Bank
    lora_path: str

    def forward(self, x: Tensor) -> Tensor:
        """Adapted output; the base's own where no rows are set."""
        if not self.lora_bank.current:
            return super().forward(x)  # type: ignore[no-any-return]
        spec, tensors = bank_parts(self.lora_bank, [self])
        return lora_linears(x, spec, tensors)[0]


class Bank:
    """Adapters by name, on one model.

    Attributes:
        tenants: the adapters.
        current: name and number of rows of each segment of the batch that is being computed.
        training: whether dropout is on.
    """

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self.tenants = dict(tenants)
        self.current: tuple[tuple[str, int], ...] = ()
        self.training = True
        self._seeds: dict[tuple[str, int], int] = {}

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Every target of every adapter asks this bank inside the `with`; the base is frozen."""
        wanted = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        paths = dict.fromkeys(path for tenant in self.tenants.values() for path in tenant.factors)
        layers = [(path, model.get_submodule(path)) for path in paths]
        for path, layer in layers:
            _join(layer, self, path)
        try:
            yield
        finally:
            for _, layer in layers:
                _leave(layer)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(wanted[name])

    @contextmanager
    def rows(self, *segments: tuple[str, int], training: bool = True) -> Iterator[None]:
        """Forward and backward passes inside compute these many rows under these adapters, in this order.

        A single segment takes all rows, whatever their number.
        """
        before = self.current, self.training, self._seeds
        self.current, self.training, self._seeds = segments, training, {}
        try:
            yield
        finally:
            self.current, self.training, self._seeds = before

    def seed(self, path: str, segment: int, tenant: Tenant) -> int:
        """Of the dropout mask of one segment: the same when the pass is computed again for its gradient."""
        if not (tenant.dropout and self.training):
            return 0
        if (path, segment) not in self._seeds:
            drawn = torch.randint(2**62, (), generator=tenant.random)
            self._seeds[path, segment] = int(drawn.item())
        return self._seeds[path, segment]


def bank_parts(bank: Bank, layers: Sequence[nn.Module]) -> tuple[Spec | Segmented, list[Tensor | None]]:
    """What `lora_linears` needs of layers that share an input, under the current rows."""
    paths = [getattr(layer, "lora_path", "") for layer in layers]
    transposed = tuple(not isinstance(layer, nn.Linear) for layer in layers)
    own = [(layer._parameters.get("weight"), layer._parameters.get("bias")) for layer in layers]
    quantised = tuple(m if isinstance(m, QuantisedLinear) else None for m in layers)
    if not bank.current:
        tensors: list[Tensor | None] = [t for W, b in own for t in (W, b, None, None)]
        return Spec((0.0,) * len(layers), transposed, quantised=quantised), tensors
    specs, tensors = [], []
    for i, (name, _) in enumerate(bank.current):
        tenant = bank.tenants[name]
        pairs = [tenant.factors.get(path) for path in paths]
        first = next((path for path, f in zip(paths, pairs, strict=True) if f is not None), None)
        seed = 0 if first is None else bank.seed(first, i, tenant)
        scalings = tuple(0.0 if f is None else f.scaling for f in pairs)
        dropout = tenant.dropout if bank.training else 0.0
        specs.append(Spec(scalings, transposed, dropout, seed, quantised))
        for (W, b), f in zip(own, pairs, strict=True):
            tensors += [W, b, None if f is None else f.A, None if f is None else f.B]
    if len(specs) == 1:
        return specs[0], tensors
    return Segmented(tuple(specs), tuple(rows for _, rows in bank.current)), tensors


def can_join(module: nn.Module) -> bool:
    """Whether a bank can serve `module`: exactly a linear layer, of either orientation."""
    plain = (
        type(module) is nn.Linear or isinstance(module, QuantisedLinear) or not isinstance(module, nn.Linear)
    )
    return plain and not isinstance(module, AdaptedLayer) and linear_shape(module) is not None


def _join(module: nn.Module, bank: Bank, path: str) -> None:
    kind = type(module)
    module.__class__ = type(f"Bank{kind.__name__}", (BankLayer, kind), {"__module__": kind.__module__})
    module.__dict__ |= {"lora_bank": bank, "lora_path": path, "lora_is_active": True, "lora_kind": kind}


def _leave(module: nn.Module) -> None:
    module.__class__ = module.__dict__["lora_kind"]
    for name in [name for name in module.__dict__ if name.startswith("lora_")]:
        del module.__dict__[name]
