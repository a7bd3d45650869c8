"""What is written of a run beside its tensors: what it is, what it was made from, and what came of it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from lorasmith.data import fingerprint
from lorasmith.lora import Adapter
from lorasmith.train.outputs import commit, versions
from lorasmith.train.result import TrainResult
from lorasmith.train.show import peak_rss_bytes

if TYPE_CHECKING:
    from lorasmith.train.loop import Run

CHANGES_NOTHING = ("save_every", "budget_bytes", "offload", "shard")
"""Settings that a resumed run may change."""


def identity(run: Run) -> dict[str, Any]:
    """What must be the same for a run to go on, to the bit."""
    settings = {k: v for k, v in run.settings.to_dict().items() if k not in CHANGES_NOTHING}
    settings |= run.policy.identity
    together: dict[str, Any] = {"processes": run.world.size} if run.world.size > 1 else {}
    together |= {"in_parts": True} if run.shards else {}
    return {
        **{f"train.{k}": v for k, v in settings.items()},
        **{f"lora.{k}": v for k, v in run.config.to_dict().items()},
        "base": run.base.fingerprint.digest,
        "dtype": str(run.model.dtype).removeprefix("torch."),
        "data": fingerprint(run.examples),
        "eval_data": fingerprint(run.sets.evaluation.examples) if run.sets.evaluation else None,
        "threads": torch.get_num_threads(),
        **together,
    }


def run_record(run: Run) -> dict[str, Any]:
    """The contents of `run.json`."""
    together = {"processes": run.world.size} if run.world.size > 1 else {}
    return {
        "lora": run.config.to_dict(),
        "train": run.settings.to_dict(),
        "base": run.base.name,
        "base_fingerprint": run.base.fingerprint.to_dict(),
        "data_fingerprint": fingerprint(run.examples),
        "data": asdict(run.sets.train.stats),
        "policy": run.policy.lines,
        "layout": {"packing": run.layout.packing, "reason": run.layout.reason},
        "steps": run.total,
        "versions": versions(),
        "commit": commit(),
        **together,
    }


def provenance(run: Run) -> dict[str, Any]:
    """What goes into an adapter's sidecar."""
    return {
        "base": {"name": run.base.name, "fingerprint": run.base.fingerprint.to_dict()},
        "data_fingerprint": fingerprint(run.examples),
        "run": {"lora": run.config.to_dict(), "train": run.settings.to_dict()},
        "versions": versions(),
    }


def result_of(
    run: Run, adapter: Adapter | None, *, started: float, resumed: int | None, interrupted: bool
) -> TrainResult:
    """What `train` reports."""
    p = run.progress
    return TrainResult(
        adapter=adapter,
        adapter_dir=run.folder / run.method.folder,
        steps=p.step,
        train_loss=sum(run.losses) / len(run.losses) if run.losses else None,
        eval_loss=p.best_loss,
        tokens_per_s=p.tokens / p.train_s if p.train_s else 0.0,
        tokens=p.tokens,
        supervised_tokens=p.supervised_tokens,
        trainable_params=run.trainable_params,
        total_params=sum(x.numel() for x in run.model.parameters()),
        peak_rss_bytes=run.world.most(peak_rss_bytes()),
        wall_s=time.monotonic() - started,
        resumed_from_step=resumed,
        interrupted=interrupted,
        processes=run.world.size,
    )
