"""`Method`: one way of tuning a model, as the training loop sees it; and how a trained one is applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorasmith.baselines.files import Tuned, write_method
from lorasmith.baselines.options import OPTIONS
from lorasmith.errors import AdapterFileError
from lorasmith.lora import Adapter

METHODS = tuple(OPTIONS)


class Method(Protocol):
    """What the loop asks of a way of tuning.

    Attributes:
        name: as in `TrainConfig.method`.
        folder: where in a run's folder the result goes.
        trains_base: gradients of (nearly) every weight are formed.
        can_recompute: layers may be computed again in the backward pass.
    """

    name: str
    folder: str
    trains_base: bool
    can_recompute: bool

    def attach(self, model: nn.Module, *, seed: int) -> object:
        """Put on `model` what the method adds, and let train what trains; returns a report to print."""

    def prepare(self, model: nn.Module, probe: Callable[[], None]) -> None:
        """Anything that wants one forward pass (`probe`) of the model as it will train."""

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What trains, by name."""

    def detach(self, model: nn.Module) -> None:
        """Take everything off again."""

    def write(self, base: Any, path: Path, provenance: dict[str, Any]) -> Adapter | None:
        """Write what was trained; returns the adapter if that is what it is."""


@dataclass(frozen=True)
class Report:
    """What was put on. `coarse`: dtypes of two bytes in which some of it trains, if any."""

    text: str
    trainable: int
    total: int
    coarse: str = ""

    def __str__(self) -> str:
        share = self.trainable / self.total
        said = f"{self.text}: {self.trainable:,} of {self.total:,} parameters train ({share:.2%})"
        if self.coarse:
            said += f"\n  the base's own train in {self.coarse}, which rounds small updates away; --dtype fp32 does not"
        return said


class Baseline(ABC):
    """What the methods of this room share: they write `Tuned`, and can be applied without training."""

    name: str
    folder = "adapter"
    trains_base = False
    can_recompute = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    def attach(self, model: nn.Module, *, seed: int) -> Report:
        """See `Method`. Random tensors come from a generator seeded with `seed`."""
        total = sum(p.numel() for p in model.parameters())
        model.requires_grad_(False)
        text = self._add(model, torch.Generator().manual_seed(seed))
        trained = self.parameters(model).values()
        coarse = {str(p.dtype).removeprefix("torch.") for p in trained if p.dtype.itemsize < 4}
        return Report(text, sum(p.numel() for p in trained), total, ", ".join(sorted(coarse)))

    @abstractmethod
    def _add(self, model: nn.Module, generator: torch.Generator) -> str:
        """Add, mark what trains, and say what was done."""

    def prepare(self, model: nn.Module, probe: Callable[[], None]) -> None:  # noqa: B027
        """Nothing, for most."""

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Whatever requires a gradient."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """See `Method`."""

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What is kept of the training."""
        return {name: p.detach() for name, p in self.parameters(model).items()}

    def apply(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put trained tensors on `model`; `detach` takes them off.

        Raises:
            AdapterFileError: names or shapes are not those that this method has on this model.
        """
        self.attach(model, seed=0)
        try:
            copy_into(self.parameters(model), tensors, self.name)
        except AdapterFileError:
            self.detach(model)
            raise
        model.requires_grad_(False)

    def write(self, base: Any, path: Path, provenance: dict[str, Any]) -> None:
        """See `Method`."""
        tensors = {n: t.detach().cpu().clone() for n, t in self.tensors(base.model).items()}
        options = {key: value for key, value in self.options.items() if key != "init_ids"}
        write_method(Tuned(self.name, options, tensors, provenance), path)


@torch.no_grad()
def copy_into(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], method: str) -> None:
    """Copy each tensor to the parameter of its name; all or none.

    Raises:
        AdapterFileError: with every name and shape that does not fit.
    """
    faults = [f"{name} is missing" for name in parameters if name not in tensors]
    faults += [f"{name} belongs to nothing here" for name in tensors if name not in parameters]
    faults += [
        f"{name} has shape {tuple(t.shape)}, here it is {tuple(parameters[name].shape)}"
        for name, t in tensors.items()
        if name in parameters and t.shape != parameters[name].shape
    ]
    refuse(method, faults)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def refuse(method: str, faults: Sequence[str]) -> None:
    """Raise AdapterFileError with the first of `faults`, if there are any."""
    if faults:
        more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise AdapterFileError(
            f'What method "{method}" trained does not fit this base:\n  ' + "\n  ".join(faults[:8]) + more
        )


def make_method(name: str, options: Mapping[str, Any], tokenizer: Any = None) -> Baseline:
    """The method called `name`, with every option that it has.

    Args:
        tokenizer: needed where `init_text` is given.
    """
    from lorasmith.baselines.bottleneck import Houlsby, Lin
    from lorasmith.baselines.intrinsic import Intrinsic
    from lorasmith.baselines.prefix import Prefix, Prompt
    from lorasmith.baselines.weights import BitFit, Full, TopLayers

    kinds: tuple[type[Baseline], ...] = (Full, TopLayers, BitFit, Houlsby, Lin, Prefix, Prompt, Intrinsic)
    (kind,) = (k for k in kinds if k.name == name)
    settings = dict(options)
    if settings.get("init_text"):
        settings["init_ids"] = list(tokenizer.encode(settings["init_text"], add_special_tokens=False))
    return kind(settings)


def apply_method(model: nn.Module, tuned: Tuned) -> Baseline:
    """Let `model` compute as it was tuned; the returned method's `detach(model)` ends that.

    Raises:
        AdapterFileError: the tensors do not fit this model.
    """
    method = make_method(tuned.method, {k: v for k, v in tuned.options.items() if k != "init_text"})
    method.apply(model, tuned.tensors)
    return method


@contextmanager
def applied(model: nn.Module, tuned: Tuned) -> Iterator[Baseline]:
    """`apply_method` inside the `with`."""
    method = apply_method(model, tuned)
    try:
        yield method
    finally:
        method.detach(model)
