"""What a run will need, said before it starts; a run that cannot fit is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from lorasmith.data import Example, Steps
from lorasmith.inject import lora_layers
from lorasmith.planning import (
    Job,
    Pass,
    Trained,
    decoder_of,
    estimate,
    gib,
    require_fit,
    resident_bytes,
    this_machine,
)
from lorasmith.train.batch import Layout
from lorasmith.train.config import TrainConfig

STEPS_LOOKED_AT = 48
FLOOR_BYTES = 200 * 2**20  # Python and torch alone


def preflight(
    model: nn.Module,
    settings: TrainConfig,
    layout: Layout,
    examples: Sequence[Example],
    plan: Steps,
    *,
    total: int,
    keeps_best: bool,
) -> str:
    """One line about the memory that the run will take, from the model as it is about to be trained.

    Raises:
        BudgetError: it cannot fit this machine or the container's limit.
    """
    try:
        decoder = decoder_of(model)
    except AttributeError as missing:
        return f"plan: none, for this architecture's config does not say what memory depends on ({missing})"
    ranks = {path: layer.factors.rank for path, layer in lora_layers(model).items()}
    job = Job(
        decoder,
        Trained(None if settings.method == "full" else ranks),
        passes_of(layout, examples, plan, total=total, batch_tokens=settings.batch_tokens),
        steps=total,
        recompute=settings.checkpoint_layers,
        keeps_best=keeps_best,
    )
    # By now every weight was touched once, so what is resident is them and the runtime.
    runtime = max(FLOOR_BYTES, resident_bytes() - sum(p.nbytes for p in model.parameters()))
    machine = this_machine(None)
    found = estimate(job, machine, runtime_bytes=runtime)
    if next(model.parameters()).device.type == "cpu":
        require_fit(found, machine)
    return (
        f"plan: peak {gib(found.peak_bytes)} of {gib(machine.memory_bytes)}: weights {gib(found.weights_bytes)}, "
        f"activations {gib(found.activation_bytes + found.allocator_bytes)}, gradients and optimizer "
        f"{gib(found.gradient_bytes + found.optimizer_bytes)}; {found.flops:.2e} operations"
    )


def passes_of(
    layout: Layout, examples: Sequence[Example], plan: Steps, *, total: int, batch_tokens: int
) -> list[list[Pass]]:
    """The passes of some optimizer steps: those with the most tokens, and others evenly from the run."""
    lengths = np.array([len(example) for example in examples])
    tokens = [int(lengths[plan[k]].sum()) for k in range(min(total, 20_000))]
    if len(tokens) <= STEPS_LOOKED_AT:
        chosen = np.arange(len(tokens))
    else:
        heaviest = np.argsort(tokens, kind="stable")[-STEPS_LOOKED_AT // 2 :]
        chosen = np.union1d(heaviest, np.linspace(0, len(tokens) - 1, STEPS_LOOKED_AT // 2, dtype=int))
    return [
        [
            Pass(
                len(batch.input_ids),
                batch.input_ids.shape[1],
                len(batch.targets),
                batch.attention is not None,
            )
            for batch in layout.batches(examples, plan[int(k)], batch_tokens=batch_tokens)
        ]
        for k in chosen
    ]
