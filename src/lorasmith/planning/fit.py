"""Settings that fit a memory budget: give up what costs least first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorasmith.errors import BudgetError, ConfigError
from lorasmith.planning.activations import Pass, Trained
from lorasmith.planning.estimate import Estimate, Job, estimate, gib
from lorasmith.planning.machine import Machine

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
LEAST_LENGTH = 64


@dataclass(frozen=True)
class Fit:
    """Settings, what they need, and what was given up for them."""

    rank: int
    batch_tokens: int
    max_length: int
    checkpoint_layers: bool
    peak_bytes: int
    train_s: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def parse_bytes(text: str) -> int:
    """`8GiB`, `500 MB` or `1073741824` in bytes.

    Raises:
        ConfigError: it is no size, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    size = int(float(match[1]) * UNITS[match[2].lower()]) if match and match[2].lower() in UNITS else 0
    if size < 1:
        raise ConfigError(f"{text!r} is no amount of memory: write it as 8GiB, 500MB or a number of bytes.")
    return size


def fit(
    job: Job,
    machine: Machine,
    *,
    runtime_bytes: int,
    rank: int,
    batch_tokens: int,
    max_length: int,
    longest: int,
    time_factor: float = 1.0,
) -> Fit:
    """The settings nearest to those asked for that fit `machine`.

    In turn: smaller passes (exact, a little slower), layers recomputed (exact, about a third slower), a
    lower rank (capacity), shorter sequences (data is cut). Every pass is taken as full as it can be.

    Args:
        job: `trained.ranks` names the targets; `passes` say what share of a pass carries loss.
        longest: tokens of the longest example; longer passes than that are not needed.

    Raises:
        BudgetError: not even the smallest settings fit; what they would need is said.
    """
    share = _supervised_share(job)
    is_masked = any(p.is_masked for step in job.passes for p in step)
    found: Estimate | None = None
    asked = _Choice(rank, batch_tokens, min(max_length, longest), job.recompute)
    for choice in _choices(asked):
        found = _try(job, machine, choice, share, is_masked, runtime_bytes, time_factor)
        if found.fits:
            return Fit(
                **asdict(choice),
                peak_bytes=found.peak_bytes,
                train_s=found.train_s,
                reason=_why(asked, choice),
            )
    assert found is not None
    raise BudgetError(
        f"Nothing fits {gib(machine.memory_bytes)}: even rank 1 on {LEAST_LENGTH} tokens at a time, with layers "
        f"recomputed, needs {gib(found.peak_bytes)} (weights alone {gib(found.weights_bytes)}). "
        "Use a smaller base or more memory."
    )


@dataclass(frozen=True)
class _Choice:
    rank: int
    batch_tokens: int
    max_length: int
    checkpoint_layers: bool


def _choices(asked: _Choice) -> Iterator[_Choice]:
    """From the settings asked for to the smallest that make sense, dearest sacrifice last."""
    for length in _halved(asked.max_length, LEAST_LENGTH):
        for rank in _halved(asked.rank, 1):
            for recompute in sorted({asked.checkpoint_layers, True}):
                for tokens in _halved(max(asked.batch_tokens, length), length):
                    yield _Choice(rank, tokens, length, recompute)


def _halved(start: int, least: int) -> list[int]:
    values = [start]
    while values[-1] // 2 >= least:
        values.append(values[-1] // 2)
    return values


def _try(
    job: Job, machine: Machine, c: _Choice, share: float, is_masked: bool, runtime: int, factor: float
) -> Estimate:
    rows = max(1, c.batch_tokens // c.max_length)
    largest = Pass(rows, c.max_length, max(1, int(share * rows * c.max_length)), is_masked)
    trained = job.trained
    if trained.ranks is not None:
        trained = Trained({path: min(r, c.rank) for path, r in trained.ranks.items()})
    # Two full passes a step: gradients of the first exist during the second.
    tried = replace(job, trained=trained, passes=[[largest, largest]], recompute=c.checkpoint_layers)
    memory = estimate(tried, machine, runtime_bytes=runtime)
    real = replace(job, trained=trained, recompute=c.checkpoint_layers)
    return replace(memory, train_s=estimate(real, machine, runtime_bytes=runtime, time_factor=factor).train_s)


def _supervised_share(job: Job) -> float:
    passes = [p for step in job.passes for p in step]
    return max(p.supervised / p.slots for p in passes)


def _why(asked: _Choice, choice: _Choice) -> str:
    changes = [
        f"{name} {getattr(choice, name)} instead of {getattr(asked, name)} ({cost})"
        for name, cost in (
            ("batch_tokens", "same result, smaller passes"),
            ("checkpoint_layers", "same result, about a third slower"),
            ("rank", "less capacity"),
            ("max_length", "longer prompts lose their beginning"),
        )
        if getattr(choice, name) != getattr(asked, name)
    ]
    return "; ".join(changes) or "everything fits as asked"
