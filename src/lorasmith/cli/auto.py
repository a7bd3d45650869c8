"""`train --auto`: rank, learning rate, memory and recomputation decided from measurements, each said aloud."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.cli.options import say

if TYPE_CHECKING:
    from lorasmith.bases import Base
    from lorasmith.lora import LoRAConfig
    from lorasmith.train import TrainConfig

SHARE_OF_MEMORY = 0.95
LEAST_RANK, MOST_RANK = 8, 256


def decide(
    base: Base, data: Path, config: LoRAConfig, settings: TrainConfig, *, given: set[str]
) -> tuple[LoRAConfig, TrainConfig, list[dict[str, Any]]]:
    """Settings for whatever was not `given`, and each decision: what, value, reason, evidence."""
    from lorasmith.data import encode, read_records
    from lorasmith.train import Bench, range_test

    encoded = encode(read_records(data), base.tokenizer, max_length=settings.max_length)
    decisions: list[dict[str, Any]] = []

    def decided(what: str, value: Any, reason: str, evidence: str) -> None:
        decisions.append({"what": what, "value": value, "reason": reason, "evidence": evidence})
        say(f"auto: {what} {value}: {reason}\n  evidence: {evidence}")

    if "budget_bytes" not in given:
        settings = _within_memory(settings, decided)
    if "rank" not in given:
        config = _ranked(base, encoded, config, settings, decided)
    if "lr" not in given and settings.method == "lora":
        with Bench(base, config, encoded.examples, settings.batch_size, settings.batch_tokens) as bench:
            tested = range_test(bench, say=say)
        settings = replace(settings, lr=tested.suggested)
        decided(
            "lr", tested.suggested, "a third of the rate at which the loss was lowest in a range test",
            f"lowest smoothed loss at {tested.lowest_at:.1e}, worse than at the start from "
            + (f"{tested.diverged_at:.1e}" if tested.diverged_at else "nowhere in the test"),
        )  # fmt: skip
    return config, settings, decisions


def _within_memory(settings: TrainConfig, decided: Any) -> TrainConfig:
    from lorasmith.planning import gib, this_machine

    machine = this_machine(None)
    budget = int(SHARE_OF_MEMORY * machine.memory_bytes)
    decided(
        "budget", gib(budget), "recomputation and the size of a pass are chosen to stay within it",
        f"{SHARE_OF_MEMORY:.0%} of {gib(machine.memory_bytes)} ({machine.note})",
    )  # fmt: skip
    return replace(settings, budget_bytes=budget)


def _ranked(base: Base, encoded: Any, config: LoRAConfig, settings: TrainConfig, decided: Any) -> LoRAConfig:
    from lorasmith.analysis import capacity
    from lorasmith.train import Bench, nats_of_completions

    with Bench(base, config, encoded.examples, settings.batch_size, settings.batch_tokens) as bench:
        total = encoded.stats.supervised_tokens
        nats, seen = nats_of_completions(bench, total_supervised=total)
        per_rank = sum(x.factors.in_features + x.factors.out_features for x in bench.layers.values())
    holds = capacity(nats, per_rank)
    rank = min(MOST_RANK, max(LEAST_RANK, holds.rank))
    decided(
        "rank", rank, f"what the data's information asks for, at least {LEAST_RANK}, since optimisation likes slack",
        f"{holds}; from {seen:,} of {total:,} tokens",
    )  # fmt: skip
    return replace(config, rank=rank)
