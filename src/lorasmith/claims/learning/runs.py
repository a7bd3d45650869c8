"""Training runs that the claims share: each trained once and kept under `runs/`."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorasmith.bases import Base
from lorasmith.claims.claim import Setting
from lorasmith.claims.learning.sizes import BATCH, held_out_records, training_records
from lorasmith.errors import TrainingError
from lorasmith.lora import LoRAConfig
from lorasmith.sweep import Point, sweep
from lorasmith.train import TrainConfig, read_metrics, train

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Arm:
    """One run, by everything that its result depends on but the base.

    Attributes:
        method: "lora", "full" or "prefix".
        pairs: distinct training records; they are repeated until there were `steps` steps.
        held_out: records of the evaluation.
        lr: None stands for every learning rate that is tried.
    """

    method: str
    pairs: int
    steps: int
    held_out: int
    rank: int = 0
    targets: str | tuple[str, ...] = "all-linear"
    virtual_tokens: int = 0
    lr: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Short, and different for different arms."""
        where = "+".join(self.targets) if isinstance(self.targets, tuple) else self.targets
        size = {"lora": f"r{self.rank}-{where}", "prefix": f"l{self.virtual_tokens}"}.get(self.method, "")
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:6]
        rate = f"{self.lr:g}" if self.lr else "any"
        return f"{self.method}-{size}-n{self.pairs}-lr{rate}-s{self.seed}-{digest}".replace("--", "-")

    @property
    def train(self) -> TrainConfig:
        """Settings of the loop: one evaluation, at the end."""
        options = {"virtual_tokens": self.virtual_tokens} if self.method == "prefix" else {}
        return TrainConfig(
            method=self.method,  # type: ignore[arg-type]
            options=options,  # type: ignore[arg-type]
            lr=self.lr,
            epochs=math.ceil(self.steps * BATCH / self.pairs),
            max_steps=self.steps,
            batch_size=BATCH,
            eval_every=self.steps,
            save_every=self.steps,
            seed=self.seed,
        )

    @property
    def lora(self) -> LoRAConfig:
        """Factors; alpha stays 32, so that a rate means the same at every rank."""
        return LoRAConfig(rank=self.rank, alpha=32, targets=self.targets)


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        loss: nats per supervised token of the held-out records; infinite where training diverged.
        base_loss: before training.
        folder: of the run; the adapter is `adapter/` in it, a full fine-tune `model/`.
    """

    loss: float
    base_loss: float
    params: int
    folder: Path


@dataclass(frozen=True)
class Tuned:
    """An arm at its own best learning rate.

    Attributes:
        losses: at that rate, one per seed.
        by_rate: learning rate → loss of the first seed.
        runs: outcomes at that rate, one per seed.
    """

    lr: float
    losses: tuple[float, ...]
    by_rate: Mapping[float, float]
    runs: tuple[Outcome, ...]

    @property
    def mean(self) -> float:
        """Mean loss over the seeds."""
        return sum(self.losses) / len(self.losses)

    @property
    def base_loss(self) -> float:
        """Loss before training."""
        return self.runs[0].base_loss


def tune(
    setting: Setting, arms: Iterable[Arm], rates: Sequence[float], seeds: Sequence[int]
) -> dict[Arm, Tuned]:
    """Train each arm at every rate with the first seed, then with the other seeds at its best rate."""
    arms = list(arms)
    tried = run(setting, [replace(arm, lr=lr, seed=seeds[0]) for arm in arms for lr in rates])
    by_rate = {arm: {lr: tried[replace(arm, lr=lr, seed=seeds[0])].loss for lr in rates} for arm in arms}
    best = {arm: replace(arm, lr=min(rates, key=by_rate[arm].__getitem__)) for arm in arms}
    done = run(setting, [replace(best[arm], seed=seed) for arm in arms for seed in seeds])
    found = {arm: tuple(done[replace(best[arm], seed=seed)] for seed in seeds) for arm in arms}
    return {
        arm: Tuned(best[arm].lr or 0.0, tuple(o.loss for o in found[arm]), by_rate[arm], found[arm])
        for arm in arms
    }


def run(setting: Setting, arms: Iterable[Arm]) -> dict[Arm, Outcome]:
    """Outcome of each arm, trained now where it was not yet: LoRA's many in one process, on one base."""
    arms = list(dict.fromkeys(arms))
    missing = [arm for arm in arms if not (_folder(setting, arm) / OUTCOME).exists()]
    together: dict[tuple[int, int], list[Arm]] = {}
    for arm in missing:
        if arm.method == "lora":
            together.setdefault((arm.pairs, arm.seed), []).append(arm)
        else:
            _train_alone(setting, arm)
    for group in together.values():
        _train_together(setting, group)
    return {arm: _read(_folder(setting, arm)) for arm in arms}


def _train_together(setting: Setting, arms: Sequence[Arm]) -> None:
    first = arms[0]
    setting.say(f"training {len(arms)} adapters, {first.steps} steps each on {first.pairs} records")
    shared = setting.out / "runs" / f"sweep-{_digest([a.name for a in arms])}"
    varied = ("rank", "targets", "lr", "seed")
    points = [Point(a.name, {key: getattr(a, key) for key in varied}, a.lora, a.train) for a in arms]
    result = sweep(
        setting.load(), training_records(first.pairs), points, out=shared,
        eval_data=held_out_records(first.held_out), resume=True,
    )  # fmt: skip
    if result.interrupted:
        raise TrainingError("The training was stopped; ask again and it goes on.")
    by_name = {run["name"]: run for run in result.runs}
    for arm in arms:
        _keep(shared / arm.name, _folder(setting, arm), by_name[arm.name]["trainable_params"])
    shutil.rmtree(shared)


def _train_alone(setting: Setting, arm: Arm) -> None:
    setting.say(f"training {arm.name}: {arm.steps} steps")
    part = setting.out / "runs" / f"{arm.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        result = train(
            base_for(setting, arm.method), training_records(arm.pairs), arm.lora if arm.rank else None, arm.train,
            out=part, eval_data=held_out_records(arm.held_out), quiet=True,
        )  # fmt: skip
    except TrainingError as error:
        setting.say(f"  {error}")
        params = 0
    else:
        if result.interrupted:
            raise TrainingError("The training was stopped; ask again and it starts this run anew.")
        params = result.trainable_params
    _keep(part, _folder(setting, arm), params)


def base_for(setting: Setting, method: str) -> Base:
    """A fresh base; every weight trains in float32 only, since bfloat16 would round small steps away."""
    return setting.load("fp32" if method == "full" else "auto")


def _keep(folder: Path, target: Path, params: int) -> None:
    """Leave of a run what is used, under its own name, at once."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "eval_loss" in row]
    losses = {row["step"]: row["eval_loss"] for row in rows}
    last = losses.pop(max(losses)) if len(losses) > 1 else None
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    outcome = {"loss": last, "base_loss": losses[0], "params": params}
    (folder / OUTCOME).write_text(json.dumps(outcome) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)


def _read(folder: Path) -> Outcome:
    values: dict[str, Any] = json.loads((folder / OUTCOME).read_text())
    loss = math.inf if values["loss"] is None else values["loss"]
    return Outcome(loss, values["base_loss"], values["params"], folder)


def _folder(setting: Setting, arm: Arm) -> Path:
    return setting.out / "runs" / _digest(setting.base) / arm.name


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
