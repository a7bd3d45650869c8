"""One arm: a method, trained on a task with a seed and a rate, and its greedy answers to the test."""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.claims.claim import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasmith.bases import Base
    from lorasmith.train import TrainResult

Rows = Sequence[Mapping[str, Any]]
NEVER = 10**6
MIB = 2**20


@dataclass(frozen=True)
class Arm:
    """A method as it is compared.

    Attributes:
        dtype: of the base: bfloat16 only where everything that trains is kept in float32 beside it.
        rates: learning rates that the validation chooses from; the middle one is taken by `--quick`.
    """

    name: str
    said: str
    rates: tuple[float, float, float]
    dtype: str = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)


ARMS = (
    Arm("lora", "LoRA, rank 16, every linear layer", (5e-4, 1e-3, 2e-3), "auto"),
    Arm("full", "full fine-tuning", (3e-5, 1e-4, 3e-4)),
    Arm("prefix", "prefix tuning, 5 virtual tokens", (1e-3, 3e-3, 1e-2), "auto"),
    Arm("bitfit", "BitFit, biases added to every linear layer", (1e-3, 3e-3, 1e-2), options={"biases": "added"}),
    Arm("houlsby", "bottleneck adapter (Houlsby), width 32", (5e-4, 1e-3, 2e-3), options={"bottleneck": 32}),
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A task's records as they are used here, and what is spent on them.

    Attributes:
        steps: optimizer steps of a final run, of 8 sequences. search_steps: of a run that only tries a rate.
    """

    task: str
    train: Rows
    validation: Rows
    test: Rows
    steps: int
    search_steps: int
    max_tokens: int

    @property
    def digest(self) -> str:
        """Of every record."""
        text = json.dumps([self.train, self.validation, self.test], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def key(self, arm: Arm) -> dict[str, Any]:
        """What an arm's result depends on."""
        return {
            "claim": "quality",
            "task": self.task,
            "data": self.digest,
            "method": arm.name,
            "dtype": arm.dtype,
            "options": dict(arm.options),
        }


def best_rate(setting: Setting, arm: Arm, data: Data) -> dict[str, Any]:
    """Rate of the lowest validation loss after `search_steps`, and the loss at each."""
    if setting.quick:
        return {"rate": arm.rates[1], "losses": {}}
    losses = {}
    for rate in arm.rates:
        key = data.key(arm) | {"part": "search", "rate": rate, "steps": data.search_steps}
        losses[f"{rate:g}"] = setting.cached(key, partial(_searched, setting, arm, data, rate))
    best = min(losses, key=lambda name: (losses[name] is None, losses[name]))
    return {"rate": float(best), "losses": losses}


def _searched(setting: Setting, arm: Arm, data: Data, rate: float) -> float | None:
    from lorasmith.errors import TrainingError

    setting.say(f"  {data.task}, {arm.name}: rate {rate:g}, {data.search_steps} steps")
    try:
        with _trained(setting.load(arm.dtype), arm, data, rate, seed=0, steps=data.search_steps) as (
            result,
            _,
        ):
            return result.eval_loss
    except TrainingError:  # it diverged: the others are chosen from
        return None


def run_arm(setting: Setting, arm: Arm, data: Data, rate: float, seed: int) -> dict[str, Any]:
    """Train, answer the test, and say what that took."""
    key = data.key(arm) | {"part": "run", "rate": rate, "seed": seed, "steps": data.steps}
    return setting.cached(key, lambda: _run(setting, arm, data, rate, seed))  # type: ignore[no-any-return]


def _run(setting: Setting, arm: Arm, data: Data, rate: float, seed: int) -> dict[str, Any]:
    from lorasmith.train import peak_rss_bytes

    setting.say(f"  {data.task}, {arm.name}, seed {seed}: {data.steps} steps at {rate:g}")
    base = setting.load(arm.dtype)
    reset_peak()
    cpu = time.process_time()
    with _trained(base, arm, data, rate, seed=seed, steps=data.steps, evaluates=False) as (result, folder):
        peak, cpu = peak_rss_bytes(), time.process_time() - cpu
        started = time.monotonic()
        outputs = _answers(base, arm, result, folder, data)
        return {
            "outputs": outputs,
            "params": result.trainable_params,
            "train_s": result.wall_s,
            "train_cpu_s": cpu,
            "answer_s": time.monotonic() - started,
            "tokens_per_s": result.tokens_per_s,
            "peak_bytes": peak,
            "train_loss": result.train_loss,
            "threads": _threads(),
        }


def untuned(setting: Setting, data: Data) -> list[str]:
    """Answers of the base as it is."""
    from lorasmith.engine import Engine

    key = {"claim": "quality", "task": data.task, "data": data.digest, "part": "base"}

    def compute() -> list[str]:
        setting.say(f"  {data.task}: the base, untuned")
        base = setting.load()
        return _asked(Engine(base), base, None, data)

    return setting.cached(key, compute)  # type: ignore[no-any-return]


@contextmanager
def _trained(
    base: Base, arm: Arm, data: Data, rate: float, *, seed: int, steps: int, evaluates: bool = True
) -> Iterator[tuple[TrainResult, Path]]:
    """The run's result and its folder, which is gone afterwards."""
    from lorasmith.lora import LoRAConfig
    from lorasmith.train import TrainConfig, train

    settings = TrainConfig.from_dict(
        {
            "method": arm.name,
            "options": dict(arm.options),
            "lr": rate,
            "seed": seed,
            "epochs": -(-8 * steps // len(data.train)),
            "max_steps": steps,
            "eval_every": NEVER,
            "save_every": NEVER,
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        held_out = list(data.validation) if evaluates else None
        result = train(
            base, list(data.train), LoRAConfig(), settings, out=out, eval_data=held_out, quiet=True
        )
        if result.interrupted:  # half a run is not a result
            raise KeyboardInterrupt
        yield result, out


def _answers(base: Base, arm: Arm, result: TrainResult, folder: Path, data: Data) -> list[str]:
    from lorasmith.baselines import applied, read_method
    from lorasmith.engine import Engine

    if arm.name == "lora":
        assert result.adapter is not None
        engine = Engine(base)
        engine.add_adapter("tuned", result.adapter)
        return _asked(engine, base, "tuned", data)
    if arm.name == "full":  # the base itself is what was tuned
        return _asked(Engine(base), base, None, data)
    tuned = read_method(folder / "adapter")
    places = getattr(base.model.config, "max_position_embeddings", None)
    virtual = tuned.options.get("virtual_tokens") or 0
    with applied(base.model, tuned):
        limit = places - virtual if places is not None and virtual else None
        return _asked(Engine(base, runner="generic", max_context=limit), base, None, data)


def _asked(engine: Any, base: Base, adapter: str | None, data: Data) -> list[str]:
    """One line for each test record, greedy."""
    from lorasmith.data import read_records, render_prompt
    from lorasmith.engine import Request

    asked = [{"prompt": row["prompt"], "completion": row["completion"]} for row in data.test]
    try:
        requests = [
            Request(
                render_prompt(record, base.tokenizer),
                adapter=adapter,
                max_tokens=data.max_tokens,
                stop=("\n",),
            )
            for record in read_records(asked)
        ]
        return [result.text.strip() for result in engine.generate(requests)]
    finally:
        engine.close()


def reset_peak() -> None:
    """Let the peak of this process's memory begin anew, where the system can (Linux)."""
    from lorasmith.planning import trim_heap

    gc.collect()  # what the run before left would count as this one's
    trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _threads() -> int:
    import torch

    return torch.get_num_threads()
