"""What a run will need, said before it starts; a run that cannot fit is refused, or fitted to its budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lorasmith.data import Example
from lorasmith.data import Steps as DataSteps
from lorasmith.errors import ConfigError
from lorasmith.inject import lora_layers
from lorasmith.planning import (
    Computing,
    Estimate,
    Fit,
    Job,
    Machine,
    Pass,
    Recompute,
    Trained,
    decoder_of,
    estimate,
    fit,
    gib,
    has_many_shapes,
    require_fit,
    resident_bytes,
    this_machine,
    trim_heap,
)
from lorasmith.quantised import quantisation_of
from lorasmith.train.batch import Batch, Layout
from lorasmith.train.config import TrainConfig
from lorasmith.train.elementwise import operations
from lorasmith.train.fast import is_block
from lorasmith.train.shard import local_bytes
from lorasmith.train.shares import Share
from lorasmith.train.world import ALONE, World

if TYPE_CHECKING:
    from lorasmith.train.loop import Run

STEPS_LOOKED_AT = 16
STEPS_READ = 20_000
FLOOR_BYTES = 200 * 2**20  # Python and torch alone
TRIM_AT = 0.9
"""Share of the predicted peak: one step of other shapes adds about a tenth."""
RECOMPUTES: tuple[Recompute, ...] = ("none", "mlp", "layers")

Steps = list[list[Pass]]
"""The passes of each step."""


class Preflight(NamedTuple):
    """What was settled before the first step.

    Attributes:
        settings: with `recompute` and `batch_tokens` filled in.
        forecast: one line.
        trim_above_bytes: of resident memory after a step, from which its heap is trimmed; None for never.
    """

    settings: TrainConfig
    forecast: str
    trim_above_bytes: int | None = None


def preflight(run: Run, before: Mapping[str, Any] | None = None) -> Preflight:
    """Settle what is computed again and how much at once, and predict the memory of the run.

    Args:
        before: settings of an earlier start of this run: their choice is kept, since memory in use differs
            from start to start.

    Raises:
        BudgetError: it cannot fit its budget, this machine or the container's limit.
        ConfigError: a budget was set, and what memory depends on is not known of this base.
    """
    settings, budget = run.settings, run.settings.budget_bytes
    settled = replace(settings, recompute="none" if settings.recompute == "auto" else settings.recompute)
    if before is not None:
        settled = replace(settings, **{name: before[name] for name in ("recompute", "batch_tokens")})
    try:
        job = _job(run, settled)
    except AttributeError as missing:
        if budget is not None:
            raise ConfigError(
                f"A budget was set, but this base's config does not say what memory depends on ({missing}). "
                "Leave out --budget, and choose --recompute and --batch-tokens yourself."
            ) from missing
        return Preflight(
            settled, f"plan: none, for the base's config does not say what memory depends on ({missing})"
        )
    # By now every weight was touched once, so what is resident is them and the runtime.
    trim_heap()
    packed = quantisation_of(run.model)
    held = sum(map(local_bytes, run.model.parameters())) + (packed.stored_bytes if packed else 0)
    held = held if settled.keeps_weights else 0  # layers left as soon as they had computed
    runtime = max(FLOOR_BYTES, resident_bytes() - held)
    on_cpu = next(run.model.parameters()).device.type == "cpu"
    machine = replace(this_machine(None, processes=run.world.local_size), is_cuda=not on_cpu)
    limit = machine if budget is None else replace(machine, name="the budget", memory_bytes=budget)
    if budget is not None and before is None:
        found = _fit(run, job, limit, runtime)
        settled = replace(settled, recompute=found.recompute, batch_tokens=found.batch_tokens)
        job = _job(run, settled)
    forecast = estimate(job, machine, runtime_bytes=runtime)
    if not on_cpu:
        return Preflight(settled, _said(forecast, settled, limit, run.world))
    require_fit(forecast, machine)
    trim_above = int(TRIM_AT * forecast.peak_bytes) if has_many_shapes(job) else None
    return Preflight(settled, _said(forecast, settled, limit, run.world), trim_above)


def _job(run: Run, settings: TrainConfig) -> Job:
    decoder, even_worst = decoder_of(run.model), _passes(run, settings.batch_tokens)
    trained = Trained(None)
    if settings.method == "lora":
        layers = lora_layers(run.model)
        ranks = {path: x.factors.rank for path, x in layers.items() if path in decoder.linears}
        trained = Trained(ranks, run.trainable_params - Trained(ranks).params(decoder))
    computing = computing_of(run.model, settings, next(run.model.parameters()).dtype)
    if run.forward.parts is None or not run.forward.parts.head.is_frozen_linear:
        computing = replace(computing, is_in_place=False)
    even, worst = even_worst
    return Job(
        decoder, trained, even, run.total, worst,
        computing=computing, keeps_best=run.sets.evaluation is not None,
        gives_back=settings.budget_bytes is not None,
        sharded_over=run.world.size if run.world.is_sharded else 1,
        spreads_trained=bool(run.shards),
        keeps_weights=settings.keeps_weights,
    )  # fmt: skip


def _passes(run: Run, batch_tokens: int) -> tuple[Steps, Steps]:
    return passes_of(
        run.layout, run.examples, run.plan, total=run.total, batch_tokens=batch_tokens, world=run.world
    )


def _fit(run: Run, job: Job, within: Machine, runtime: int) -> Fit:
    asked, s = run.settings.recompute, run.settings
    return fit(
        job, within, lambda tokens: _passes(run, tokens),
        runtime_bytes=runtime, rank=run.config.rank, batch_tokens=s.batch_tokens, max_length=s.max_length,
        recomputes=RECOMPUTES if asked == "auto" else (asked,),
    )  # fmt: skip


def computing_of(model: nn.Module, settings: TrainConfig, dtype: torch.dtype) -> Computing:
    """How `computing` will compute this model's layers, as far as their parts tell.

    Args:
        model: loaded, or on the meta device: then what a CPU would do.
    """
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    blocks = settings.kernels in ("auto", "block") and any(is_block(module) for module in model.modules())
    return Computing(
        is_block=blocks,
        is_tiled=device.type == "cpu",
        is_in_place=operations(dtype, device).name == "C",
        recompute="none" if settings.recompute == "auto" else settings.recompute,
        keeps_activations=settings.keeps_activations,
    )


def _said(found: Estimate, settings: TrainConfig, machine: Machine, world: World) -> str:
    each = " in each process" if world.size > 1 else ""
    chosen = f"; recompute {settings.recompute}, {settings.batch_tokens:,} tokens at once"
    return (
        f"plan: predicted peak {gib(found.peak_bytes)} of {gib(machine.memory_bytes)}{each}: weights "
        f"{gib(found.weights_bytes)}, activations {gib(found.activation_bytes + found.allocator_bytes)}, gradients "
        f"and optimizer {gib(found.gradient_bytes + found.optimizer_bytes)}; {found.flops:.2e} operations"
        + (chosen if settings.budget_bytes is not None else "")
    )


def passes_of(
    layout: Layout,
    examples: Sequence[Example],
    plan: DataSteps,
    *,
    total: int,
    batch_tokens: int,
    world: World = ALONE,
) -> tuple[Steps, Steps]:
    """This process's passes of some steps evenly from the run; and of those with most tokens or the longest row."""
    own = Share(plan, examples, layout.packing, world)
    lengths = np.array([len(example) for example in examples])
    rows = [lengths[plan[k]] for k in range(min(total, STEPS_READ))]
    evenly = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), STEPS_LOOKED_AT), dtype=int))
    heaviest, longest = (
        np.argsort([f(r) for r in rows], kind="stable")[-STEPS_LOOKED_AT // 2 :] for f in (np.sum, np.max)
    )

    def passes(steps: np.ndarray) -> Steps:
        made = (layout.batches(examples, own[int(k)], batch_tokens=batch_tokens) for k in steps)
        return [[_pass_of(batch) for batch in batches] for batches in made if batches]

    return passes(evenly), passes(np.union1d(heaviest, longest))


def _pass_of(batch: Batch) -> Pass:
    rows, length = batch.input_ids.shape
    return Pass(rows, length, len(batch.targets), batch.attention is not None)
