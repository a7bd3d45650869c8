"""Adapters that no stack can hold are put on the model itself, one at a time, between forward passes.

Trained biases, embeddings, whole modules: `inject` knows every kind, so whatever it attaches is served.
Rows of other adapters run before or after, never in the same pass.
"""

from __future__ import annotations

import torch

from lorasmith.engine.registry import Generation
from lorasmith.engine.runner import Runner
from lorasmith.inject import carries_any, eject, inject


class AttachedPath:
    """Which adapter the model carries now. Only the loop's thread calls it.

    Attributes:
        is_changing: the model is being changed; a thread that hangs here leaves it unusable.
        is_broken: a change failed half way.
        changes: how often the model was changed.
    """

    def __init__(self, current: Generation | None = None) -> None:
        self.current = current
        self.is_changing = False
        self.is_broken = False
        self.changes = 0

    def hold(self, runner: Runner, generation: Generation | None) -> Runner:
        """Put `generation` on the model of `runner` (None: take off what is there); return who computes."""
        if generation is not self.current:
            self._change(runner, generation)
        return runner if generation is None else runner.attached()

    def _change(self, runner: Runner, generation: Generation | None) -> None:
        self.is_changing = True
        try:
            with torch.inference_mode(False), torch.no_grad():
                if self.current is not None:
                    self.is_broken = True  # unless eject comes to its end
                    eject(runner.model)
                    self.current, self.is_broken = None, False
                if generation is not None:
                    self._put(runner, generation)
        finally:
            self.is_changing = False
        self.changes += 1

    def _put(self, runner: Runner, generation: Generation) -> None:
        assert generation.adapter is not None
        runner.attached()  # tried on the plain model, before the adapter is on it
        try:
            inject(runner.model, generation.adapter)
        except Exception:
            self.is_broken = carries_any(runner.model) or bool(generation.adapter.extras.weights)
            raise
        self.current = generation
