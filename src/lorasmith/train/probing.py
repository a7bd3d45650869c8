"""Short measurements on a real base: one forward pass, runs in few dimensions, a learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lorasmith.analysis import Dimension, RateRange
    from lorasmith.data import Example
    from lorasmith.lora import Adapter, LoRAConfig

CAPACITY_RECORDS = 2000
EVALUATED = 128
PROBE_STEPS = 40
PROBE_RATES = (1e-2, 1e-1)
DIMENSIONS = tuple(1 << k for k in range(4, 17, 2))
RANGE_STEPS = 40
RANGE = (1e-5, 1e-1)


@dataclass
class Bench:
    """A base with fresh LoRA on it, its data, and the plainest training step.

    Use it as a context: on leaving, the base is as it was.
    """

    base: Any
    config: LoRAConfig
    examples: Sequence[Example]
    batch_size: int = 8
    batch_tokens: int = 2048

    def __enter__(self) -> Bench:
        from lorasmith.inject import group_shared_inputs, inject, lora_layers
        from lorasmith.train.batch import choose_layout
        from lorasmith.train.forward import Forward

        inject(self.base.model, self.config, seed=0)
        self.forward = Forward(self.base.model)
        group_shared_inputs(self.base.model, self.forward.probe)
        self.layers = lora_layers(self.base.model)
        self.parameters: dict[str, Tensor] = {
            f"{path}.{part}": getattr(layer, f"lora_{part}")
            for path, layer in self.layers.items()
            for part in "AB"
        }
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        order = [self._indices(k) for k in range(max(1, len(self.examples) // self.batch_size))]
        longest = max(len(example) for example in self.examples)
        can_mask = self.forward.can_mask(longest)
        self.layout = choose_layout("auto", self.examples, order, can_mask=can_mask, dropout=0.0)
        return self

    def __exit__(self, *_: object) -> None:
        from lorasmith.inject import eject, ungroup

        ungroup(self.base.model)
        eject(self.base.model)

    def _indices(self, step: int) -> list[int]:
        count = len(self.examples)
        return [(step * self.batch_size + i) % count for i in range(min(self.batch_size, count))]

    def reset(self) -> None:
        """Fresh factors: A random, B zero."""
        import torch

        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.start[name])

    def gradients(self, step: int) -> float:
        """Mean loss of one optimizer step's examples; the factors' gradients are left in place."""
        batches = self.layout.batches(self.examples, self._indices(step), batch_tokens=self.batch_tokens)
        supervised = sum(len(batch.targets) for batch in batches)
        total = 0.0
        for p in self.parameters.values():
            p.grad = None
        for batch in batches:
            loss = self.forward.loss_sum(batch) / supervised
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def loss(self, examples: Sequence[Example] | None = None) -> float:
        """Mean loss per supervised token, nothing changed."""
        from lorasmith.train.evaluate import evaluate_loss

        return evaluate_loss(self.forward, examples or self.examples[:EVALUATED], layout=self.layout).loss

    def load(self, adapter: Adapter) -> None:
        """Put an adapter's factors on; ranks may differ from those before."""
        for path, factors in adapter.factors.items():
            self.layers[path].set_factors(factors)


def nats_of_completions(bench: Bench, *, total_supervised: int) -> tuple[float, int]:
    """−Σ log p over all completions, from a forward pass over some, and how many tokens were looked at."""
    chosen = list(bench.examples[:CAPACITY_RECORDS])
    seen = sum(int(example.supervised.sum()) for example in chosen)
    return bench.loss(chosen) * total_supervised, seen


def range_test(bench: Bench, *, say: Callable[[str], None]) -> RateRange:
    """Forty steps whose rate rises geometrically from 1e-5 to 1e-1."""
    import torch

    from lorasmith.analysis import rate_range

    bench.reset()
    optimizer = torch.optim.AdamW(list(bench.parameters.values()), lr=RANGE[0], weight_decay=0.0)
    rates, losses = [], []
    for k in range(RANGE_STEPS):
        rate = RANGE[0] * (RANGE[1] / RANGE[0]) ** (k / (RANGE_STEPS - 1))
        losses.append(bench.gradients(k))
        rates.append(rate)
        if not math.isfinite(losses[-1]) or losses[-1] > 3 * losses[0]:
            break
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if k % 10 == 9:
            say(f"  range test: rate {rate:.1e}, loss {losses[-1]:.3f}")
    return rate_range(rates, losses)


def measure_dimension(
    bench: Bench,
    *,
    rate: float,
    seeds: int,
    steps: int | None = None,
    dimensions: Sequence[int] | None = None,
    held_out: Sequence[Example] | None = None,
    say: Callable[[str], None],
) -> Dimension:
    """d90 in LoRA space: short runs in d random directions against one unrestricted run of as many steps.

    Args:
        rate: of the unrestricted run; those in few dimensions try two of their own.
        steps, dimensions: `PROBE_STEPS` and `DIMENSIONS` where left out.
        held_out: what losses are measured on; some of the bench's own examples where left out.
    """
    import torch

    from lorasmith.analysis import intrinsic_dimension

    steps = steps or PROBE_STEPS
    bench.reset()
    base_loss = bench.loss(held_out)
    optimizer = torch.optim.AdamW(list(bench.parameters.values()), lr=rate, weight_decay=0.0)
    for k in range(steps):
        bench.gradients(k)
        optimizer.step()
    target = bench.loss(held_out)
    say(f"  unrestricted adapter, {steps} steps: loss {base_loss:.3f} → {target:.3f}")

    def run(dimension: int, seed: int) -> float:
        loss = min(
            run_in(bench, dimension, seed=seed, rate=r, steps=steps, held_out=held_out) for r in PROBE_RATES
        )
        say(f"  {dimension} numbers, projection {seed + 1}: loss {loss:.3f}")
        return loss

    total = sum(p.numel() for p in bench.parameters.values())
    grid = [d for d in dimensions or DIMENSIONS if d <= total]
    try:
        return intrinsic_dimension(run, base_loss=base_loss, target_loss=target, dimensions=grid, seeds=seeds)
    finally:
        bench.reset()


def run_in(
    bench: Bench,
    dimension: int,
    *,
    seed: int,
    rate: float,
    steps: int,
    held_out: Sequence[Example] | None = None,
) -> float:
    """Loss after training θ and λ with A = A0 + ΔA, B = ΔB, (ΔA, ΔB) = λ ⊙ P θ."""
    import torch

    from lorasmith.analysis import Projection

    projection = Projection({name: p.shape for name, p in bench.parameters.items()}, dimension, seed=seed)
    theta, scales = (torch.nn.Parameter(t) for t in (projection.theta, projection.scales))
    projection.theta, projection.scales = theta.data, scales.data  # the optimizer writes where P reads
    optimizer = torch.optim.Adam([theta, scales], lr=rate)
    for k in range(steps + 1):
        with torch.no_grad():
            for name, increment in projection.expand().items():
                bench.parameters[name].copy_(bench.start[name] + increment)
        if k == steps:
            break
        bench.gradients(k)
        gradients = {name: p.grad for name, p in bench.parameters.items() if p.grad is not None}
        theta.grad, scales.grad = projection.pull_back(gradients)
        optimizer.step()
    return bench.loss(held_out)
