"""One run of a sweep: `train`'s own run, whose forward and backward passes come from outside."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.bases import Base
from lorasmith.data import Row
from lorasmith.errors import ConfigError, TrainingError
from lorasmith.formats import write_adapter
from lorasmith.inject import Bank, Tenant, can_join, eject, inject, lora_layers
from lorasmith.lora import Adapter, Factors
from lorasmith.sweep.grid import Point
from lorasmith.sweep.passes import Unit
from lorasmith.train import Forward, Metrics, Progress, Run, Sets, read_metrics, write_atomically

OUTCOME = "result.json"


class Member(Run):
    """A run that shares its base's passes; settings, files and arithmetic are those of `train`.

    Attributes:
        point: its place in the grid.
        status: "training", then "done", "stopped" (by halving) or "diverged".
    """

    def __init__(self, point: Point, base: Base, sets: Sets, folder: Path) -> None:
        super().__init__(base, point.lora, point.train, sets, folder, quiet=True)
        self.point, self.name, self.status = point, point.name, "training"
        self.bank: Bank
        self.metrics: Metrics
        self.tenant = self._adapt()
        self.optimizer = self._make_optimizer()

    def _adapt(self) -> Tenant:
        """Fresh factors, as `train` would start from."""
        inject(self.model, self.config, seed=self.settings.seed)
        try:
            self._hold({n: p for n, p in self.model.named_parameters() if p.requires_grad})
            layers = lora_layers(self.model)
            factors = {path: Factors(la.lora_A, la.lora_B, la.lora_scaling) for path, la in layers.items()}
        finally:
            eject(self.model)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        odd = [path for path in factors if not can_join(self.model.get_submodule(path))]
        if odd:
            raise ConfigError(
                f"targets reach {odd[0]} ({len(odd)} such modules), which is not a plain linear layer; "
                "a sweep trains those alone. Leave it out, or use `lorasmith train`."
            )
        random = torch.Generator().manual_seed(self.settings.seed)
        return Tenant(factors, self.config.dropout, random)

    def units(self) -> list[Unit]:
        """What this run's next step computes."""
        groups: list[list[Row]] = self.layout.groups(
            self.examples, self.plan[self.progress.step], batch_tokens=self.settings.batch_tokens
        )
        return [Unit(self.name, i, tuple(rows)) for i, rows in enumerate(groups)]

    def start(self, forward: Forward) -> None:
        """Settle how the data are laid out."""
        self.forward = forward
        keeps_all = self.settings.recompute == "auto"
        self.settings = replace(self.settings, recompute="none") if keeps_all else self.settings
        self.layout = self._choose_layout()

    def open(self, policy: Any, step: int) -> None:
        """Make the files, or go on from the checkpoint of `step`."""
        self.policy = policy
        self.progress = self._restore(step)
        self._write_run_file()
        self.metrics = Metrics(self.folder / "metrics.jsonl", resumed_step=self.progress.step)

    def _restore(self, step: int) -> Progress:
        if not step:
            return Progress(identity=self._identity())
        with self._own_random():
            return self._load(self.folder / "checkpoints" / f"step-{step:08d}")

    def apply(self, mean: float, seconds: float) -> None:
        """Clip the gradients that were gathered, take the optimizer's step, and record it."""
        indices: Sequence[int] = self.plan[self.progress.step]
        lr, started = self.settings.lr_at(self.progress.step, self.total), time.monotonic()
        loss, norm = self._update(mean, lr)
        self._record(self.metrics, indices, loss, norm, lr, seconds + time.monotonic() - started)

    def must_save(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.progress.step % self.save_every == 0 or self.progress.step == self.total

    def is_due(self) -> bool:
        """Whether it is time for an evaluation."""
        return self.progress.step % self.eval_every == 0 or self.progress.step == self.total

    def judge(self) -> bool:
        """Evaluate; whether it is the best so far."""
        return self._judge(self._evaluate(), self.metrics)

    def loss_at(self, step: int) -> float:
        """Evaluation loss after `step` steps, from the metrics."""
        rows = [
            r for r in read_metrics(self.folder / "metrics.jsonl") if r["step"] == step and "eval_loss" in r
        ]
        return float(rows[-1]["eval_loss"]) if rows else math.nan

    def end(self, status: str) -> None:
        """Write the adapter and the outcome; free what only training needs."""
        self.status = status
        self.metrics.close()
        self._finish(interrupted=self.best is None)  # without an evaluation there is no adapter to keep
        write_atomically(self.folder / OUTCOME, json.dumps(self.outcome(), indent=2) + "\n")
        self.optimizer.state.clear()
        self.best = None
        for parameter in self.parameters.values():
            parameter.grad = None

    def outcome(self) -> dict[str, Any]:
        """What is said of this run in the end."""
        p = self.progress
        return {
            "name": self.name,
            "config": self.point.config | {"lr": self.settings.lr},
            "eval_loss": p.best_loss,
            "adapter_dir": str(self.folder / "adapter") if p.best_loss is not None else None,
            "train_loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "steps": p.step,
            "best_step": p.best_step,
            "status": self.status,
            "trainable_params": self.trainable_params,
            "tokens": p.tokens,
            "train_s": p.train_s,
        }

    def _evaluate(self) -> float:
        with self.bank.rows((self.name, 1), training=False):
            return super()._evaluate()

    def _write_result(self) -> Adapter:
        adapter = Adapter(self.config, {p: f.clone().to("cpu") for p, f in self.tenant.factors.items()})
        adapter.provenance = self._provenance()
        write_adapter(adapter, self.folder / "adapter", base_name=self.base.name)
        return adapter

    def _save(self) -> None:
        with self._own_random():
            super()._save()

    def _fail(self, loss: float, norm: float, lr: float) -> None:
        raise TrainingError(f"step {self.progress.step + 1}: loss {loss}, gradient norm {norm}, at {lr:.2g}")

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """This run's random state in the place of the process's."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.tenant.random.get_state())
        try:
            yield
        finally:
            self.tenant.random.set_state(torch.get_rng_state())
            torch.set_rng_state(before)
