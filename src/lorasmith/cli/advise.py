"""`lorasmith advise`: which rank and which learning rate, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import BaseOption, DtypeOption, JsonOption, print_json, say

if TYPE_CHECKING:
    from lorasmith.analysis import Truncation
    from lorasmith.data import Example
    from lorasmith.lora import Adapter

DIMENSION_RECORDS = 320


def advise(
    base: BaseOption,
    data: Annotated[Path, typer.Option(help="JSONL, CSV, TSV or Parquet.")],
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out records, on which the truncation curve is measured.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of a finished run: adds the truncation curve.")
    ] = None,
    dimension: Annotated[
        bool, typer.Option("--dimension", help="Also measure the intrinsic dimension (several short runs).")
    ] = False,
    lr_range: Annotated[
        bool, typer.Option("--lr-range", help="Also run a learning-rate range test.")
    ] = False,
    targets: Annotated[str, typer.Option(help='"all-linear", a,b,c (suffixes), or re:REGEX.')] = "all-linear",
    max_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    seeds: Annotated[int, typer.Option(help="Random projections for each dimension.")] = 3,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Recommend a rank from the data's information, a run's truncation curve, the intrinsic dimension."""
    from lorasmith.analysis import capacity
    from lorasmith.bases import load_base
    from lorasmith.cli.train import parse_targets
    from lorasmith.data import encode, read_records
    from lorasmith.lora import LoRAConfig
    from lorasmith.train import Bench, default_lr, measure_dimension, nats_of_completions, range_test

    loaded = load_base(base, dtype=dtype)
    encoded = encode(read_records(data), loaded.tokenizer, max_length=max_length)
    held_out = encode(read_records(eval_data), loaded.tokenizer, max_length=max_length) if eval_data else None
    found: dict[str, Any] = {"capacity_rank": None, "r90": None, "r99": None, "d90": None}
    config = LoRAConfig(targets=parse_targets(targets))  # type: ignore[arg-type]
    with Bench(loaded, config, encoded.examples) as bench:
        say("capacity: one forward pass of the base over the completions")
        nats, seen = nats_of_completions(bench, total_supervised=encoded.stats.supervised_tokens)
        per_rank = sum(f.factors.in_features + f.factors.out_features for f in bench.layers.values())
        holds = capacity(nats, per_rank)
        found |= {"capacity_rank": holds.rank, "capacity_bits": holds.bits, "capacity_exact": holds.exact_rank,
                  "capacity_evidence": f"{holds}; from {seen:,} of {encoded.stats.supervised_tokens:,} tokens"}  # fmt: skip
        rate = default_lr(int(getattr(loaded.model.config, "hidden_size", 576)))
        if lr_range:
            say("learning-rate range test")
            tested = range_test(bench, say=say)
            rate = tested.suggested
            found |= {"lr": rate, "lr_lowest_at": tested.lowest_at, "lr_diverged_at": tested.diverged_at}
        if dimension:
            say("intrinsic dimension: short runs through few numbers")
            bench.examples = bench.examples[:DIMENSION_RECORDS]
            measured = measure_dimension(bench, rate=rate, seeds=seeds, say=say)
            found |= {"d90": measured.d90, "d90_gains": {str(d): list(g) for d, g in measured.gains.items()}}
    if run is not None:
        say("truncation curve: the run's adapter at rank 1, 2, 4, …")
        curve = run_curve(loaded, run, (held_out or encoded).examples)
        found |= {"r90": curve.r90, "r99": curve.r99, "truncation_losses": {str(r): x for r, x in curve.losses.items()},
                  "truncation_base_loss": curve.base_loss, "truncation_on": "held-out" if held_out else "training"}  # fmt: skip
    found["recommendations"] = recommendations(found)
    if as_json:
        print_json(found)
    else:
        print(
            "\n".join(
                f"{r['what']}: {r['value']}\n  why       {r['reason']}\n  evidence  {r['evidence']}"
                for r in found["recommendations"]
            )
        )


def run_curve(base: Any, run: Path, examples: Sequence[Example]) -> Truncation:
    """Truncate a run's adapter to rank 1, 2, 4, … and evaluate each."""
    from lorasmith.analysis import truncation_curve
    from lorasmith.cli.options import load_adapter
    from lorasmith.train import Bench

    adapter = load_adapter(run / "adapter", base)
    with Bench(base, adapter.config, examples) as bench:
        base_loss = bench.loss()

        def evaluate(of: Adapter) -> float:
            bench.load(of)
            return bench.loss()

        return truncation_curve(adapter, evaluate, base_loss=base_loss)


def recommendations(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each with its value, reason and evidence, from what was measured."""
    made = []
    if found["r99"] is not None:
        losses = ", ".join(f"r{r} {loss:.3f}" for r, loss in found["truncation_losses"].items())
        made.append({
            "what": "rank", "value": found["r99"],
            "reason": "the least rank that kept 99 % of a real run's gain; capacity may be spent better than on more",
            "evidence": f"loss on {found['truncation_on']} records: base {found['truncation_base_loss']:.3f}, {losses}; r90 {found['r90']}",
        })  # fmt: skip
    else:
        made.append({
            "what": "rank", "value": min(256, max(8, found["capacity_rank"])),
            "reason": "at least what the data's information asks for; 8 where that is less, since optimisation likes some slack",
            "evidence": found["capacity_evidence"],
        })  # fmt: skip
    if found["d90"] is not None:
        gains = "; ".join(
            f"{d}: " + ", ".join(f"{g:.0%}" for g in gs) for d, gs in found["d90_gains"].items()
        )
        made.append({
            "what": "intrinsic dimension", "value": found["d90"],
            "reason": "so many numbers in random directions keep 90 % of the gain: an upper bound on what is needed, and no rank",
            "evidence": f"share of the gain by dimension, one figure a projection: {gains}",
        })  # fmt: skip
    if "lr" in found:
        where = f"{found['lr_diverged_at']:.1e}" if found["lr_diverged_at"] else "not within the test"
        made.append({
            "what": "learning rate", "value": found["lr"],
            "reason": "a third of the rate at which the loss was lowest; tuning it is worth more than any LoRA variant",
            "evidence": f"lowest smoothed loss at {found['lr_lowest_at']:.1e}, worse than at the start from: {where}",
        })  # fmt: skip
    return made
