"""Intrinsic dimension: every weight moves, but only along d directions that chance chose.

θ = θ₀ + P θ_d (DID), or layer by layer θ_i = θ₀_i + λ_i P_i θ_{d−m} with m learned λ (SAID), for all of the
base's parameters; θ_d starts at zero, λ at one. The weights are formed in place before a forward pass, so
that every kernel serves, and each weight's gradient is projected as soon as it is whole, then freed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.baselines.anatomy import body_of, decoder_layers
from lorasmith.baselines.method import copy_into, refuse
from lorasmith.baselines.projection import FASTFOOD_WEIGHTS, Fastfood, Projection, Sparse
from lorasmith.baselines.weights import OwnWeights
from lorasmith.errors import ConfigError

NEEDED = ("seed", "projection_digest")


class Intrinsic(OwnWeights):
    """`theta` (d − m,) and, with SAID, `multipliers` (m,) train; P comes from the seed."""

    name = "intrinsic"
    trains_base = True

    def _add(self, model: nn.Module, generator: torch.Generator) -> str:
        self.options.setdefault("seed", generator.initial_seed())
        generator = torch.Generator().manual_seed(self.options["seed"])
        weights = dict(model.named_parameters())
        total = sum(p.numel() for p in weights.values())
        self._groups = self._layer_groups(model, weights)
        m, d = (max(self._groups.values()) + 1 if self.options["said"] else 0), self.options["dimension"]
        if not m < d <= total:
            raise ConfigError(
                f"dimension={d} was asked: it must be more than the {m} multipliers of SAID, and at most the "
                f"{total:,} weights of this model."
            )
        kind = self.options["projection"]
        if kind == "auto":
            kind = self.options["projection"] = "fastfood" if total <= FASTFOOD_WEIGHTS else "sparse"
        sizes = {name: p.numel() for name, p in weights.items()}
        made = Fastfood if kind == "fastfood" else Sparse
        self._projection: Projection = made(sizes, d - m, generator)
        self._check_digest()
        device = next(model.parameters()).device
        self.theta = nn.Parameter(torch.zeros(d - m, device=device))
        self.multipliers = nn.Parameter(torch.ones(m, device=device)) if m else None
        self._train(weights)
        self._formed: list[Tensor] = []
        self._hooks: list[Any] = [
            p.register_post_accumulate_grad_hook(self._project(n))  # type: ignore[no-untyped-call]
            for n, p in weights.items()
        ]
        self._hooks.append(body_of(model).register_forward_pre_hook(lambda *_: self._form(weights)))
        said = f" and {m} multipliers (SAID)" if m else " (DID)"
        return f"{d - m} directions{said} of a {kind} projection onto every weight"

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The few numbers; the weights only pass their gradients on."""
        found = {"theta": self.theta, "multipliers": self.multipliers}
        return {name: p for name, p in found.items() if p is not None}

    def apply(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Form the weights once."""
        refuse(self.name, [f"{key} is missing in its options" for key in NEEDED if key not in self.options])
        self.attach(model, seed=int(self.options["seed"]))
        try:
            copy_into(self.parameters(model), tensors, self.name)
        except BaseException:
            self.detach(model)
            raise
        self._form(dict(model.named_parameters()))
        self._remove_hooks()
        model.requires_grad_(False)

    def detach(self, model: nn.Module) -> None:
        """The weights are bit for bit what they were."""
        self._remove_hooks()
        super().detach(model)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _form(self, weights: Mapping[str, nn.Parameter]) -> None:
        """W = W₀ + λ P θ, rounded once; nothing where θ and λ are what they were."""
        now = [p.detach() for p in (self.theta, self.multipliers) if p is not None]
        if self._formed and all(torch.equal(a, b) for a, b in zip(now, self._formed, strict=True)):
            return
        self._formed = [t.clone() for t in now]
        for name, weight in weights.items():
            shift = self._projection.forward(name, self.theta) * self._multiplier(name)
            weight.copy_(self._kept[name].to(shift.dtype) + shift.view(weight.shape))

    def _project(self, name: str) -> Any:
        @torch.no_grad()
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            projected = self._projection.transpose(name, weight.grad.float().flatten())
            weight.grad = None
            _accumulate(self.theta, projected * self._multiplier(name))
            if self.multipliers is not None:
                one = torch.zeros_like(self.multipliers)
                one[self._groups[name]] = projected @ self.theta  # <P θ, g> = <θ, Pᵀ g>
                _accumulate(self.multipliers, one)

        return hook

    def _multiplier(self, name: str) -> Tensor | float:
        return 1.0 if self.multipliers is None else self.multipliers.detach()[self._groups[name]]

    def _layer_groups(self, model: nn.Module, weights: Mapping[str, Any]) -> dict[str, int]:
        """Name → number of the multiplier: one per decoder layer, and a last one for what is in none."""
        starts = [f"{path}." for path in decoder_layers(model)]
        rest = len(starts)
        return {name: next((k for k, s in enumerate(starts) if name.startswith(s)), rest) for name in weights}

    def _check_digest(self) -> None:
        found = self._projection.digest()
        if self.options.setdefault("projection_digest", found) != found:
            refuse(
                self.name, ["the random projection drawn here is not the one that was trained with: "
                            "this PyTorch draws other numbers from the seed, or the model has other weights"]
            )  # fmt: skip


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
