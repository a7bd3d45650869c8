"""The merged fast path: when one adapter owns all traffic, its delta rides in the weights."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.engine.registry import Generation
from lorasmith.engine.runner import Runner
from lorasmith.engine.scheduler import Scheduler
from lorasmith.errors import MergeStateError
from lorasmith.inject import merge, unmerge


class MergedPath:
    """Merges after `after_steps` steps of one adapter alone; leaves before a step that needs another.

    Leaving restores the base's own bits (`inject.unmerge`), so nobody is served a worn base.
    """

    def __init__(self, after_steps: int | None) -> None:
        self._after_steps = after_steps
        self._candidate: Generation | None = None
        self._streak = 0
        self.current: Generation | None = None
        self.is_changing = False

    def before_step(self, scheduler: Scheduler, owners: Sequence[Generation | None]) -> None:
        """Merge or leave, given the owners of every request that runs or waits."""
        if self._after_steps is None or not owners:
            return
        only = owners[0] if len(set(owners)) == 1 else None
        if self.current is not None and only is not self.current:
            self.leave(scheduler.runner)
        self._streak = self._streak + 1 if only is not None and only is self._candidate else 0
        self._candidate = only
        if only is not None and self.current is None and self._streak >= self._after_steps:
            self._enter(scheduler, only)

    def leave(self, runner: Runner) -> None:
        """Put the base back."""
        if self.current is not None:
            self.is_changing = True
            self.current = None
            unmerge(runner.model)
            runner.refresh()
            self.is_changing = False

    def _enter(self, scheduler: Scheduler, generation: Generation) -> None:
        assert generation.adapter is not None
        runner = scheduler.runner
        scheduler.attached.hold(runner, None)
        try:
            merge(runner.model, generation.adapter)
        except MergeStateError:
            self._after_steps = None  # weights are shared or someone else merged: stay unmerged
            return
        self.is_changing = True  # and it stays so if this fails: then no weight can be trusted
        runner.refresh()
        self.current = generation
        self.is_changing = False
