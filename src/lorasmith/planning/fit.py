"""Settings that fit a memory budget: give up what costs least first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorasmith.errors import BudgetError
from lorasmith.planning.activations import Pass, Recompute, Trained
from lorasmith.planning.estimate import Estimate, Job, estimate, gib
from lorasmith.planning.machine import Machine

LEAST_TOKENS = 256
COSTS: dict[Recompute, float] = {"none": 1.0, "mlp": 1.1, "layers": 1.33}
"""Step time of each choice: the share of the products that is computed again."""
OVERHEAD_TOKENS = 16
"""What a pass costs besides its tokens, in tokens."""

Steps = tuple[Sequence[Sequence[Pass]], Sequence[Sequence[Pass]]]
"""Passes of steps evenly from the run, and of its worst."""


@dataclass(frozen=True)
class Fit:
    """Settings, what they need, and what was given up for them."""

    rank: int
    batch_tokens: int
    max_length: int
    recompute: Recompute
    peak_bytes: int
    train_s: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def fit(
    job: Job,
    machine: Machine,
    passes_of: Callable[[int], Steps],
    *,
    runtime_bytes: int,
    rank: int,
    batch_tokens: int,
    max_length: int,
    recomputes: Sequence[Recompute],
    least_rank: int | None = None,
    time_factor: float = 1.0,
) -> Fit:
    """The fastest settings that fit `machine`, the exact ones first.

    In turn: smaller passes and recomputation, which change no result (the cheapest of these first), then
    a lower rank.

    Args:
        job: its `passes` and `worst` are made anew.
        passes_of: those two, given the most tokens of one pass; a row is never cut.
        recomputes: what may be computed again.
        least_rank: down to which the rank may be lowered; None keeps it.

    Raises:
        BudgetError: nothing fits; what the least would take is said.
    """
    least: Estimate | None = None
    choices = _exact_choices(job, batch_tokens, recomputes)
    passes = {tokens: passes_of(tokens) for tokens in {tokens for _, tokens in choices}}
    for lower in _ranks(rank, least_rank):
        for recompute, tokens in choices:
            trained = _at_rank(job.trained, lower)
            computing = replace(job.computing, recompute=recompute)
            even, worst = passes[tokens]
            tried = replace(job, trained=trained, passes=even, worst=worst, computing=computing)
            found = estimate(tried, machine, runtime_bytes=runtime_bytes, time_factor=time_factor)
            if found.fits:
                why = _why((rank, batch_tokens, "none"), (lower, tokens, recompute))
                return Fit(lower, tokens, max_length, recompute, found.peak_bytes, found.train_s, why)
            if least is None or found.peak_bytes < least.peak_bytes:
                least = found
    assert least is not None
    raise BudgetError(_refusal(machine, least))


def _exact_choices(
    job: Job, batch_tokens: int, recomputes: Sequence[Recompute]
) -> list[tuple[Recompute, int]]:
    """(recompute, batch_tokens), the fastest first."""
    sizes = [batch_tokens, *(s for k in range(1, 12) if (s := batch_tokens >> k) >= LEAST_TOKENS)]
    useful = dict.fromkeys(replace(job.computing, recompute=name).again for name in recomputes)
    options = [(name, size) for name in useful for size in sizes]
    return sorted(options, key=lambda o: (COSTS[o[0]] * (1 + OVERHEAD_TOKENS / o[1]), -o[1]))


def _ranks(rank: int, least: int | None) -> Iterator[int]:
    yield rank
    while least is not None and rank // 2 >= least:
        rank //= 2
        yield rank


def _at_rank(trained: Trained, rank: int) -> Trained:
    if trained.ranks is None:
        return trained
    return replace(trained, ranks={path: min(r, rank) for path, r in trained.ranks.items()})


def _why(asked: tuple[int, int, str], chosen: tuple[int, int, str]) -> str:
    costs = {
        "rank": "less capacity",
        "batch_tokens": "same result, smaller passes",
        "recompute": "same result, more arithmetic",
    }
    changes = [
        f"{name} {now} instead of {before} ({cost})"
        for (name, cost), before, now in zip(costs.items(), asked, chosen, strict=True)
        if now != before
    ]
    return "; ".join(changes) or "everything fits as asked"


def _refusal(machine: Machine, least: Estimate) -> str:
    p = least.largest_pass
    return (
        f"Nothing fits {gib(machine.memory_bytes)}: the least that this run takes is {gib(least.peak_bytes)} and a "
        f"tenth to spare, of it {gib(least.weights_bytes)} for the base's weights, {gib(least.runtime_bytes)} for the process itself, "
        f"{gib(least.activation_bytes + least.allocator_bytes)} for {p.rows} x {p.length} tokens at once.\n  "
        "Raise the budget, shorten --max-length, lower the rank, or take a smaller base."
    )
