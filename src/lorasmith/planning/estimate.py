"""One run, predicted: memory at its worst moment, disk, operations and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lorasmith.errors import BudgetError
from lorasmith.planning.activations import (
    Computing,
    Pass,
    Trained,
    backward_bytes,
    logit_bytes,
    saved_by_layer,
    saved_bytes,
)
from lorasmith.planning.decoder import Decoder
from lorasmith.planning.machine import CUDA_CONTEXT_BYTES, Machine
from lorasmith.planning.memory import FP32_BYTES
from lorasmith.planning.work import work_of

HOLES_PER_BYTE = {False: 0.18, True: 0.40}
"""Free space between what a heap holds, per byte; True: passes differ in shape, so blocks seldom fit again."""
LATER_BYTES = 90 * 10**6
"""What a run imports and keeps after its start: kernels' scratch, the progress bar, the plot at the end."""
KERNELS_BYTES = 340 * 10**6
"""Of passes that differ: compiled products (`train.policy` keeps 192) and the heap's growth from step to step. Fitted."""
EVEN_SHAPES = 2
"""Shapes of pass that a run of equal rows has: full ones, and the last."""

MARGIN = 1.1
"""A run fits with a tenth to spare: of twelve measured runs one took 8 % more than was predicted (records/plan.jsonl)."""

KEPT_CHECKPOINTS = 3
"""The last two and the best."""


@dataclass(frozen=True)
class Job:
    """What would be run.

    Attributes:
        passes: of one optimizer step each, for some steps evenly from the run: what time is counted from.
        worst: of the steps with the most tokens or the longest rows: what memory must bear besides.
        steps: optimizer steps of the whole run.
        computing: how layers are computed, and which of them again in the backward pass.
        keeps_best: a held-out set chooses the best adapter, of which a copy is kept.
        file_itemsize: bytes of a weight in the base's own file.
        gives_back: freed memory goes back to the system at once, as under a budget, so the heap has no holes.
        sharded_over: processes that the base is spread over, layer by layer; 1 keeps it whole.
        spreads_trained: so is what trains in the layers, with its gradients and moments.
        keeps_weights: else each layer's are here only while it computes.
        is_mapped: the weights are pages of that file, which become resident when they are read; of input
            embeddings that is a few rows.
    """

    decoder: Decoder
    trained: Trained
    passes: Sequence[Sequence[Pass]]
    steps: int
    worst: Sequence[Sequence[Pass]] = ()
    computing: Computing = field(default_factory=Computing)
    keeps_best: bool = False
    file_itemsize: int | None = None
    is_mapped: bool = False
    gives_back: bool = False
    sharded_over: int = 1
    spreads_trained: bool = False
    keeps_weights: bool = True


@dataclass(frozen=True)
class Estimate:
    """Bytes, operations and seconds of a run.

    Attributes:
        runtime_bytes: Python, its libraries, tokenizer and data (measured); on a GPU its context.
        activation_bytes: what autograd keeps of the largest pass, and what lives beside it at the worst moment.
        logits_bytes: of that, the loss's chunk.
        allocator_bytes: holes that the C library's heap leaves between tensors of different sizes.
        peak_bytes: all of it at the worst moment.
        fits: there is that much, and `MARGIN`.
        checkpoint_bytes: one finished task. disk_bytes: what the run's folder holds at the end.
        by_layer: what autograd keeps of the last layer, by purpose.
    """

    trainable_params: int
    weights_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int
    runtime_bytes: int
    allocator_bytes: int
    peak_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    flops: int
    train_s: float
    fits: bool
    largest_pass: Pass
    by_layer: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def estimate(job: Job, machine: Machine, *, runtime_bytes: int, time_factor: float = 1.0) -> Estimate:
    """Predict a run on `machine`.

    Args:
        runtime_bytes: what a process like this one holds before the base (ignored on a GPU).
        time_factor: measured over predicted time of one step, where one was measured.
    """
    d, trained = job.decoder, job.trained
    numbers = trained.params(d)
    itemsize = d.itemsize if trained.is_full else FP32_BYTES
    weights, state = weights_here(job), trained_here(job) * itemsize
    runtime = CUDA_CONTEXT_BYTES if machine.is_cuda else runtime_bytes
    looked_at = [*job.passes, *job.worst]
    largest = max((p for step in looked_at for p in step), key=lambda p: _live(job, p))
    activations = _live(job, largest)
    accumulates = any(len(step) > 1 for step in looked_at)
    adapter = 0 if trained.is_full else state
    never_read = (
        d.untied_embeddings * d.itemsize
        if job.is_mapped and not (trained.is_full or machine.is_cuda or job.sharded_over > 1)
        else 0
    )
    constant = weights - never_read + adapter + 2 * state + (state if job.keeps_best else 0)
    in_backward = state + backward_bytes(d, trained, largest, job.computing)
    if job.spreads_trained:  # the gradients of a layer, and the buffer through which their sums go out
        in_backward += 2 * itemsize * max(numbers // d.layers, d.untied_embeddings * trained.is_full)
    if trained.is_full:  # the dense gradients of embedding and head, before they are added to what there is
        in_backward += 2 * d.itemsize * d.vocabulary * d.width
    moment = max(activations + (state if accumulates or not trained.is_full else 0), in_backward)
    moment += 0 if trained.is_full else d.unpacked_bytes
    allocator = 0 if machine.is_cuda else heap_holes(job, largest)
    ending = weights + state + numbers * itemsize if job.spreads_trained else 0  # whole in the first process
    peak = runtime + max(constant + moment + allocator, _loading(job), ending)
    flops, seconds = _work(job, machine)
    return Estimate(
        trainable_params=numbers,
        weights_bytes=weights,
        adapter_bytes=adapter,
        gradient_bytes=state,
        optimizer_bytes=2 * state,
        activation_bytes=activations,
        logits_bytes=logit_bytes(d, trained, largest, job.computing),
        runtime_bytes=runtime,
        allocator_bytes=allocator,
        peak_bytes=peak,
        checkpoint_bytes=numbers * itemsize,
        disk_bytes=numbers * itemsize * (1 + 3 * KEPT_CHECKPOINTS),
        flops=flops,
        train_s=seconds * time_factor,
        fits=MARGIN * peak <= machine.memory_bytes,
        largest_pass=largest,
        by_layer=saved_by_layer(d, trained, largest, job.computing)[-1],
    )


QUANTISING_BYTES = 6
"""Of each weight of a layer while it is quantised: the file's page, and its codes twice."""
GATHERED_LAYERS = 3
"""Of a sharded base: the layer that computes, the next, and the buffer through which they come."""


def weights_here(job: Job) -> int:
    """Bytes of the base in one process."""
    d, n = job.decoder, job.sharded_over
    if not job.keeps_weights:  # the layer that computes, and the next as the kernel reads ahead
        return (d.params - d.layer_params + 2 * d.largest_layer_params) * d.itemsize
    if n == 1:
        return d.params * d.itemsize if job.trained.is_full else d.weights_bytes
    spread = _in_layers(d)
    gathered = max(GATHERED_LAYERS * d.largest_layer_params, d.untied_embeddings)
    return (d.params - spread + -(-spread // n) + gathered) * d.itemsize


def trained_here(job: Job) -> int:
    """Numbers that train in one process: all of them, or its part of those in the layers."""
    d, numbers = job.decoder, job.trained.params(job.decoder)
    if not job.spreads_trained:
        return numbers
    outside = d.params - _in_layers(d) if job.trained.is_full else job.trained.other_params
    return outside + -(-(numbers - outside) // job.sharded_over)


def _in_layers(d: Decoder) -> int:
    """Weights that a sharded base spreads."""
    return d.layer_params + d.untied_embeddings


def heap_holes(job: Job, p: Pass) -> int:
    """What the C library's heap holds between tensors: fitted to measured runs (benchmarks/bench_plan.py), not derived.

    Training keeps freed memory for its next step (`train.policy`), so the heap is as long as it ever was: holes among
    what lives long, and the working set of a layer once more, for it is rarely where it was.
    """
    d, trained, how = job.decoder, job.trained, job.computing
    kept = saved_bytes(d, trained, p, how)
    copies = 2 * d.itemsize if trained.is_full else 4 * FP32_BYTES
    state = copies * trained_here(job)
    varies = has_many_shapes(job)
    if job.gives_back:
        return varies * KERNELS_BYTES + LATER_BYTES
    holes = HOLES_PER_BYTE[varies] * kept + HOLES_PER_BYTE[False] * state + varies * KERNELS_BYTES
    return int(holes) + backward_bytes(d, trained, p, how) + LATER_BYTES


def has_many_shapes(job: Job) -> bool:
    """Whether the passes differ in shape, as those of packed rows do."""
    return len({(p.rows, p.length) for step in (*job.passes, *job.worst) for p in step}) > EVEN_SHAPES


def _live(job: Job, p: Pass) -> int:
    """Activations at the worst moment of one pass."""
    given = job.decoder, job.trained, p, job.computing
    return saved_bytes(*given) + max(logit_bytes(*given), backward_bytes(*given))


def _loading(job: Job) -> int:
    """While the base is read: its weights, and the file's pages where they are converted to another dtype."""
    d = job.decoder
    file = job.file_itemsize or d.itemsize
    if d.packed is not None and not job.trained.is_full:  # layer by layer
        return d.weights_bytes + QUANTISING_BYTES * d.packed.largest
    if not job.keeps_weights:
        return weights_here(job)
    if job.sharded_over > 1 and file == d.itemsize:  # each process reads its part of the file alone
        return weights_here(job)
    return d.params * (d.itemsize + (file if file != d.itemsize else 0))


def _work(job: Job, machine: Machine) -> tuple[int, float]:
    """Operations and seconds of the run: the mean of the steps looked at, times all steps."""
    works = [work_of(job.decoder, job.trained, p, job.computing) for step in job.passes for p in step]
    share = job.steps / len(job.passes)
    update = 10 * job.trained.params(job.decoder) * FP32_BYTES / machine.bytes_per_s
    return (
        int(sum(w.flops for w in works) * share),
        sum(w.seconds(machine) for w in works) * share + update * job.steps,
    )


def require_fit(found: Estimate, machine: Machine, *, advice: str = "") -> None:
    """Refuse a run that cannot fit.

    Raises:
        BudgetError: with what is needed, what there is and what would help.
    """
    if found.fits:
        return
    raise BudgetError(
        f"This run needs about {gib(found.peak_bytes)}, with a tenth to spare, and {machine.name} has "
        f"{gib(machine.memory_bytes)} for it ({machine.note}).\n  weights {gib(found.weights_bytes)}, activations "
        f"{gib(found.activation_bytes + found.allocator_bytes)}, optimizer and gradients "
        f"{gib(found.optimizer_bytes + found.gradient_bytes)}, runtime {gib(found.runtime_bytes)}.\n  "
        + (
            advice
            or "Let --budget choose what is recomputed, lower --max-length or --rank, or take a smaller base."
        )
    )


def gib(size: float) -> str:
    """`3.2 GiB`."""
    return f"{size / 2**30:,.2f} GiB"
