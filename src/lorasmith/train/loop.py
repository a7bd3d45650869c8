"""`train`: from a base, data and settings to an adapter on disk."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.bases import Base, load_base
from lorasmith.data import Example, Steps, steps
from lorasmith.errors import TrainingError
from lorasmith.inject import lora_layers
from lorasmith.lora import Adapter, LoRAConfig
from lorasmith.planning import resident_bytes, trim_heap
from lorasmith.quantised import quantisation_of
from lorasmith.train.announce import announce, not_finite
from lorasmith.train.batch import Batch, Layout, choose_layout
from lorasmith.train.checkpoint import (
    Progress,
    adds_otherwise,
    checkpoint_parameters,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from lorasmith.train.config import TrainConfig
from lorasmith.train.evaluate import evaluate_loss
from lorasmith.train.forward import Forward
from lorasmith.train.methods import method_of
from lorasmith.train.offload import layers_away
from lorasmith.train.outputs import (
    Metrics,
    NoMetrics,
    plot_loss,
    prepare_folder,
    read_metrics,
    write_atomically,
)
from lorasmith.train.policy import computing, limit_kept_kernels
from lorasmith.train.preflight import preflight
from lorasmith.train.records import identity, provenance, result_of, run_record
from lorasmith.train.result import TrainResult
from lorasmith.train.sets import Sets
from lorasmith.train.shard import Shards, shard_model
from lorasmith.train.shares import Share, in_step, require_enough
from lorasmith.train.show import Show, peak_rss_bytes
from lorasmith.train.signals import Signals
from lorasmith.train.world import ALONE, World, partners, world


def train(
    base: Base | str,
    data: Any,
    config: LoRAConfig | None = None,
    train_config: TrainConfig | None = None,
    *,
    out: str | Path,
    eval_data: Any = None,
    resume: bool = False,
    quiet: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train one adapter and write it to `out/adapter`, with metrics, settings and a plot beside it.

    The base is left as it was: LoRA is taken off again and the modes are restored. (Full fine-tuning,
    `method="full"`, is about changing it: `base.model` then holds the tuned weights; and a sharded base is of no
    use any more, for its weights lie in several processes.) Under `torchrun` its processes train one adapter
    together, as one process would; a restart by torchrun goes on by itself.

    Args:
        base: a loaded base, or a name for `load_base`.
        data: a path, a `datasets.Dataset`, or any iterable of records (see `read_records`).
        eval_data: held-out records; the adapter of the lowest loss on them is kept.
        resume: go on from the newest checkpoint in `out`; from the start where there is none.
        on_step: called after each optimizer step with its number.

    Raises:
        DataError: nothing to train on. ConfigError, TargetError: settings that cannot work.
        TrainingError: the loss or gradient is not finite, or a checkpoint belongs to another run.
        OutputError: `out` holds another run, or cannot be written.
    """
    started = time.monotonic()
    limit_kept_kernels()
    config, settings = config or LoRAConfig(), train_config or TrainConfig()
    with world() as here, partners():
        device = "cpu" if here.size == 1 or settings.shard != "none" else here.device
        loaded = load_base(base, device=device) if isinstance(base, str) else base
        sets = Sets.read(loaded, data, eval_data, settings)
        is_new, goes_on = not Path(out).exists(), resume or here.has_begun(Path(out))
        folder = prepare_folder(Path(out), goes_on)
        try:
            run = Run(loaded, config, settings, sets, folder, quiet=quiet, world=here)
            with run.adapted_model():
                result = run.go(resume=goes_on, started=started, on_step=on_step)
        finally:
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if is_new and not any(folder.iterdir()):  # refused before anything was written
                    folder.rmdir()
        del loaded, run  # a sharded base would keep the process group beyond its end
        return result


class Run:
    """One training run on one model, from settings to files."""

    def __init__(
        self,
        base: Base,
        config: LoRAConfig,
        settings: TrainConfig,
        sets: Sets,
        folder: Path,
        *,
        quiet: bool,
        world: World = ALONE,
    ) -> None:
        self.base, self.config, self.asked, self.sets = base, config, settings, sets
        self.width = int(getattr(base.model.config, "hidden_size", 576))
        self.settings = settings = settings.resolved(width=self.width)
        self.method = method_of(settings, config, base.tokenizer, quantised=quantisation_of(base.model))
        self.folder, self.quiet = folder, quiet or not world.is_first
        self.world = replace(world, is_sharded=settings.shard != "none")
        require_enough(settings.batch_size, len(sets.train.examples), world)
        self.model: nn.Module = base.model
        self.examples: list[Example] = sets.train.examples
        order = {name: getattr(settings, name) for name in ("batch_size", "epochs", "seed", "shuffle")}
        self.plan: Steps = steps(self.examples, **order)
        self.total = min(len(self.plan), settings.max_steps or len(self.plan))
        self.eval_every = settings.eval_every or max(1, math.ceil(self.total / 5))
        self.save_every = settings.save_every or max(1, math.ceil(self.total / 10))
        self.losses: deque[float] = deque(maxlen=max(1, self.total // 10))
        self.best: dict[str, Tensor] | None = None
        self.adds_otherwise = False

    @contextmanager
    def adapted_model(self) -> Iterator[None]:
        """What the method adds is on, and in training mode, inside; the base as it was outside."""
        modes = {module: module.training for module in self.model.modules()}
        wanted = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.report = self.method.attach(self.model, seed=self.settings.seed)
        try:
            self.sharding = None
            if self.settings.shard != "none":
                self.sharding = shard_model(
                    self.model, self.world, self.settings.shard, trains_base=self.method.trains_base
                )
            self._set_training_modes()
            # From here on: what comes before the first step passes through the layers too.
            with nullcontext() if self.settings.keeps_weights else layers_away(self.model):
                yield
        finally:
            self.method.detach(self.model)
            for module, mode in modes.items():
                module.training = mode
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(wanted.get(name, False))

    def _set_training_modes(self) -> None:
        # The base's own dropout stays off; only LoRA's is part of the method.
        self.model.eval()
        for layer in lora_layers(self.model).values():
            layer.training = True

    def go(self, *, resume: bool, started: float, on_step: Callable[[int], None] | None) -> TrainResult:
        """From the adapted model to the files in `out`."""
        torch.manual_seed(self.settings.seed)
        self.forward = Forward(self.model, label_smoothing=self.settings.label_smoothing)
        self._hold(self.method.parameters(self.model))
        self.optimizer = self._make_optimizer()
        self.layout = self._choose_layout()
        self.own = Share(self.plan, self.examples, self.layout.packing, self.world)
        self.method.prepare(self.model, self.forward.probe)
        self._settle(resume=resume)
        with computing(
            self.model,
            kernels=self.settings.kernels,
            recompute=self.settings.recompute,
            offload=self.settings.offload,
            flops=self._flops(),
            warm_up=self._warm_up,
            keep_freed=self.settings.budget_bytes is None and not self.world.is_sharded,
        ) as self.policy:
            return self._run(resume=resume, started=started, on_step=on_step)

    def _run(self, *, resume: bool, started: float, on_step: Callable[[int], None] | None) -> TrainResult:
        torch.manual_seed(self.settings.seed)
        self.progress = self._resume() if resume else Progress(identity=self._identity())
        resumed = self.progress.step if resume and self.progress.step else None
        self.world.require_same(self._identity() | {"step": self.progress.step})
        metrics: Metrics = NoMetrics()
        if self.world.is_first:
            self._write_run_file()
            metrics = Metrics(self.folder / "metrics.jsonl", resumed_step=self.progress.step)
        self.world.note_begun(self.folder)
        with Show(self.total, start=self.progress.step, quiet=self.quiet) as show, Signals() as signals:
            announce(self, show)
            try:
                self._steps(show, metrics, signals, on_step)
            finally:
                metrics.close()
        interrupted = self.progress.step < self.total
        if not interrupted:
            self._save()
        adapter = self._finish(interrupted=interrupted)
        return result_of(self, adapter, started=started, resumed=resumed, interrupted=interrupted)

    def _hold(self, trained: Mapping[str, nn.Parameter]) -> None:
        """What trains, by name; of what is sharded `parameters` has this process's part."""
        self.trainable_params = sum(p.numel() for p in trained.values())
        self.shards = Shards(trained)
        self.parameters = self.shards.parameters

    def _make_optimizer(self) -> torch.optim.AdamW:
        s = self.settings
        return torch.optim.AdamW(
            self.parameters.values(), lr=s.lr or 0.0, betas=s.betas, weight_decay=s.weight_decay, fused=True
        )

    def _choose_layout(self) -> Layout:
        order = [self.plan[k] for k in range(min(self.total, self.plan.per_epoch))]
        longest = max(s.stats.longest for s in (self.sets.train, self.sets.evaluation) if s is not None)
        can_mask = self.settings.packing != "none" and self.forward.can_mask(longest)
        return choose_layout(
            self.settings.packing, self.examples, order, can_mask=can_mask, dropout=self.config.dropout
        )

    def _first_batches(self) -> list[Batch]:
        return self.layout.batches(self.examples, self.own[0], batch_tokens=self.settings.batch_tokens)

    def _flops(self) -> float:
        """Of all steps: forward 2, input gradients 2, weight gradients 2 per weight and slot."""
        slots = sum(batch.slots for batch in self._first_batches()) * self.total
        weights = sum(p.numel() for p in self.model.parameters() if p.ndim == 2)
        return (6.0 if self.method.trains_base else 4.0) * weights * slots

    def _warm_up(self) -> None:
        self.forward.loss_sum(self._first_batches()[0]).backward()  # type: ignore[no-untyped-call]
        self.shards.take_gradients()
        self.optimizer.zero_grad(set_to_none=True)

    def _settle(self, *, resume: bool) -> None:
        """What is recomputed and how much is computed at once; by a budget only at the run's first start."""
        before = self.folder / "run.json"
        was_settled = resume and self.settings.budget_bytes is not None and before.is_file()
        chosen = json.loads(before.read_text())["train"] if was_settled else None
        settled = preflight(self, chosen)
        self.forecast, self.trim_above_bytes = settled.forecast, settled.trim_above_bytes
        self.settings = self.world.of_first(settled.settings)  # a budget may fit otherwise elsewhere

    def _identity(self) -> dict[str, Any]:
        return identity(self)

    def _resume(self) -> Progress:
        path = latest_checkpoint(self.folder / "checkpoints")
        return Progress(identity=self._identity()) if path is None else self._load(path)

    def _load(self, path: Path) -> Progress:
        now = self._identity()
        progress = load_checkpoint(path, now, self.parameters, self.optimizer, shards=self.shards)
        self.adds_otherwise = adds_otherwise(progress.identity, now)
        progress.identity = now
        rows = read_metrics(self.folder / "metrics.jsonl")
        self.losses.extend(row["loss"] for row in rows if "loss" in row and row["step"] <= progress.step)
        if progress.best_step is not None:
            best = self.folder / "checkpoints" / f"step-{progress.best_step:08d}"
            self.best = checkpoint_parameters(best, self.parameters, self.shards)
        return progress

    def _write_run_file(self) -> None:
        write_atomically(self.folder / "run.json", json.dumps(run_record(self), indent=2) + "\n")

    def _steps(
        self, show: Show, metrics: Metrics, signals: Signals, on_step: Callable[[int], None] | None
    ) -> None:
        p = self.progress
        if p.step == 0 and self.sets.evaluation is not None:
            metrics.add(step=0, eval_loss=self._evaluate())
        while p.step < self.total and not self.world.any(signals.received):
            started = time.monotonic()
            indices = self.plan[p.step]
            lr = self.settings.lr_at(p.step, self.total)
            loss, norm = self._step(indices, lr)
            self._record(metrics, indices, loss, norm, lr, time.monotonic() - started)
            show.step(p.step, loss=sum(self.losses) / len(self.losses), rate=p.tokens / p.train_s)
            self._evaluate_and_save(show, metrics)
            if self.trim_above_bytes is not None and resident_bytes() > self.trim_above_bytes:
                trim_heap()
            if on_step is not None:
                on_step(p.step)
        if p.step < self.total:
            self._save()
            show.say(
                f"stopped after step {p.step} of {self.total}; the checkpoint is saved, go on with --resume"
            )

    def _record(
        self, metrics: Metrics, indices: Sequence[int], loss: float, norm: float, lr: float, seconds: float
    ) -> None:
        """Count a step that was made."""
        p = self.progress
        tokens = sum(len(self.examples[i]) for i in indices)
        p.step, p.tokens, p.train_s = p.step + 1, p.tokens + tokens, p.train_s + seconds
        p.supervised_tokens += sum(int(self.examples[i].supervised.sum()) for i in indices)
        self.losses.append(loss)
        metrics.add(
            step=p.step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=tokens,
            tokens_per_s=tokens / seconds,
            step_s=seconds,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def _step(self, indices: Sequence[int], lr: float) -> tuple[float, float]:
        """One optimizer step; the parameters change only if loss and gradient are finite."""
        own = self.own[self.progress.step]
        batches = self.layout.batches(self.examples, own, batch_tokens=self.settings.batch_tokens)
        supervised = sum(int(self.examples[i].supervised.sum()) for i in indices)
        total = torch.zeros((), dtype=torch.float64)
        self.world.seed(self.settings.seed, self.progress.step)
        for batch in in_step(batches, self.world):
            loss = self.forward.loss_sum(batch)
            (loss / supervised).backward()  # type: ignore[no-untyped-call]
            total += loss.detach().double().cpu()
        (loss_sum,) = self.world.reduce_(self.shards.replicated, total.item())
        self.shards.take_gradients()
        return self._update(loss_sum / supervised, lr)

    def _update(self, mean: float, lr: float) -> tuple[float, float]:
        """Clip and apply the gradients of a step whose mean loss is known."""
        norm = self.shards.clip_grad_norm_(self.settings.clip, self.world)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            if self.progress.step:
                self._save()
            raise TrainingError(not_finite(self, mean, norm, lr))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean, norm

    def _evaluate(self) -> float:
        assert self.sets.evaluation is not None
        held_out = self.sets.evaluation.examples
        return evaluate_loss(self.forward, held_out, layout=self.layout, world=self.world).loss

    def _evaluate_and_save(self, show: Show, metrics: Metrics) -> None:
        p, is_best = self.progress, False
        if self.sets.evaluation is not None and (p.step % self.eval_every == 0 or p.step == self.total):
            is_best = self._judge(loss := self._evaluate(), metrics)
            show.say(f"step {p.step}: evaluation loss {loss:.4f}")
        if is_best or p.step % self.save_every == 0:
            self._save()

    def _judge(self, loss: float, metrics: Metrics) -> bool:
        """Note an evaluation loss; whether it is the lowest so far, whose parameters are then kept."""
        p = self.progress
        metrics.add(step=p.step, eval_loss=loss)
        is_best = p.best_loss is None or loss < p.best_loss
        if is_best:
            p.best_step, p.best_loss = p.step, loss
            self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
        return is_best

    def _save(self) -> None:
        self.world.require_equal(self.shards.replicated)
        save_checkpoint(
            self.folder / "checkpoints", self.progress, self.parameters, self.optimizer,
            shards=self.shards, world=self.world,
        )  # fmt: skip

    def _finish(self, *, interrupted: bool) -> Adapter | None:
        if self.world.is_first:
            plot_loss(self.folder / "metrics.jsonl", self.folder / "loss.png")
        if interrupted:
            return None
        with torch.no_grad():
            for name, value in (self.best or {}).items():
                self.parameters[name].copy_(value)
        self.optimizer.state.clear()  # room for the whole of it
        with self.shards.gathered(self.model, self.world):
            return self._write_result() if self.world.is_first else None

    def _write_result(self) -> Adapter | None:
        return self.method.write(self.base, self.folder / self.method.folder, self._provenance())

    def _provenance(self) -> dict[str, Any]:
        return provenance(self)
