"""Methods that train the base's own numbers: all of them, the last layers, or the biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.baselines.anatomy import decoder_layers, final_norm, linear_modules
from lorasmith.baselines.files import Tuned, method_text
from lorasmith.baselines.method import Baseline
from lorasmith.bases import write_base
from lorasmith.errors import ConfigError
from lorasmith.formats import METHOD_FILE


class OwnWeights(Baseline):
    """Trains some of the base's parameters in place, and puts them back when it is taken off."""

    _kept: dict[str, Tensor]

    def _train(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._kept = {name: p.detach().clone() for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def detach(self, model: nn.Module) -> None:
        """The weights are bit for bit what they were."""
        here = dict(model.named_parameters())
        for name, value in self._kept.items():
            here[name].copy_(value)
        self._kept = {}


class Full(Baseline):
    """Every weight trains. Nothing is put back: `base.model` then holds the tuned weights."""

    name = "full"
    folder = "model"
    trains_base = True

    def _add(self, model: nn.Module, generator: torch.Generator) -> str:
        model.requires_grad_(True)
        return "every weight"

    def detach(self, model: nn.Module) -> None:
        """Nothing to take off."""

    def write(self, base: Any, path: Path, provenance: dict[str, Any]) -> None:
        """A model directory that `load_base` reads, with the method named beside the weights."""
        write_base(base, path)
        (path / METHOD_FILE).write_text(method_text(Tuned("full", {}, {}, provenance)), encoding="utf-8")


class TopLayers(OwnWeights):
    """The last k decoder layers and the norm after them."""

    name = "top-k"

    def _add(self, model: nn.Module, generator: torch.Generator) -> str:
        layers, k = decoder_layers(model), int(self.options["top_layers"])
        if k > len(layers):
            raise ConfigError(f"top_layers={k} was asked, and this model has {len(layers)} decoder layers.")
        chosen = tuple(f"{path}." for path in list(layers)[-k:])
        self._train({n: p for n, p in model.named_parameters() if n.startswith(chosen)} | final_norm(model))
        return f"the last {k} of {len(layers)} decoder layers and the final norm"


class BitFit(OwnWeights):
    """Every bias: of linear layers and of norms. `biases="added"` gives linear layers without one a zero bias."""

    name = "bitfit"

    def _add(self, model: nn.Module, generator: torch.Generator) -> str:
        own = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}
        bare = [(path, m) for path, m in linear_modules(model) if m.bias is None]
        self._added = bare if self.options["biases"] == "added" else []
        if not own and not self._added:
            raise ConfigError(
                f"BitFit trains a model's biases, and {type(model).__name__} has none. "
                f'biases="added" gives each of its {len(bare)} linear layers a zero bias '
                f"({sum(m.out_features for _, m in bare):,} parameters) and trains those."
            )
        for _, module in self._added:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
        self._train(own)
        return f"{len(own)} biases of the base" + (
            f", {len(self._added)} zero biases added to linear layers" if self._added else ""
        )

    def detach(self, model: nn.Module) -> None:
        """Own biases as they were, added ones gone."""
        super().detach(model)
        for _, module in self._added:
            module.register_parameter("bias", None)
