"""What a run says of itself: before its first step, and when it can take no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorasmith.train.show import Show

if TYPE_CHECKING:
    from lorasmith.train.loop import Run


def announce(run: Run, show: Show) -> None:
    """Data, targets, layout, kernels, and the reason for each setting left at its default."""
    for line in (*_of_data(run), *_of_computing(run), *_of_settings(run)):
        show.say(line)


def _of_data(run: Run) -> Iterator[str]:
    stats = run.sets.train.stats
    cut = f"; {stats.truncated_examples} prompts cut on the left" if stats.truncated_examples else ""
    yield (
        f"data: {stats.examples} examples, {stats.tokens:,} tokens, "
        f"{stats.supervised_tokens:,} carry loss{cut}"
    )
    for problem in run.sets.problems[:5]:
        yield f"  left out or odd – {problem}"
    if len(run.sets.problems) > 5:
        yield f"  … and {len(run.sets.problems) - 5} more: `lorasmith data check` lists them"


def _of_computing(run: Run) -> Iterator[str]:
    yield str(run.report)
    yield f"packing: {run.layout.packing} ({run.layout.reason})"
    yield f"dtype: {run.base.dtype_reason}"
    yield from run.world.lines
    if run.sharding is not None:
        yield run.sharding
    yield from run.policy.lines
    yield run.forecast


def _of_settings(run: Run) -> Iterator[str]:
    settings = run.settings
    yield f"{run.total} steps of {settings.batch_size} sequences, peak learning rate {settings.lr:.2g}"
    for name, reason in run.asked.reasons(width=run.width).items():
        yield f"  {name} {getattr(settings, name)}: {reason}"
    if run.progress.step:
        yield f"resuming after step {run.progress.step}"
    if run.adds_otherwise:
        yield "  with other processes, or what trains in other parts: equal within rounding, no longer to the bit"


def not_finite(run: Run, loss: float, norm: float, lr: float) -> str:
    """Why a run stops whose next step would spoil what it trains."""
    done = run.progress.step
    kept = f"in {run.folder / 'checkpoints'}" if done else "(nothing was trained yet)"
    return (
        f"Step {done + 1}: loss {loss}, gradient norm {norm}, at learning rate {lr:.2g}. The state after step {done} is "
        f"good and was kept {kept}. Use a lower learning rate, or look at the data of this step: examples {run.plan[done]}."
    )
