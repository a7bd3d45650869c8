"""`lorasmith eval`: loss and text metrics on held-out records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.methods import load_tuned, method_engine, put_on
from lorasmith.cli.options import (
    BaseOption,
    DtypeOption,
    JsonOption,
    MismatchOption,
    QuantizeOption,
    print_json,
)
from lorasmith.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from lorasmith.baselines import Tuned
    from lorasmith.bases import Base
    from lorasmith.data import RecordSet
    from lorasmith.engine import Engine
    from lorasmith.lora import Adapter

METRICS = ("loss", "bleu", "chrf", "exact-match", "accuracy")


def evaluate(
    base: BaseOption,
    data: Annotated[Path, typer.Option(help="JSONL, CSV, TSV or Parquet.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter directory; without it, the plain base.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Of loss, bleu, chrf, exact-match, accuracy; commas between.")
    ] = "loss",
    max_tokens: Annotated[int, typer.Option(help="New tokens per answer.")] = 128,
    max_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a base or an adapter."""
    wanted = [name.strip() for name in metric.split(",") if name.strip()]
    for name in wanted:
        if name not in METRICS:
            raise ConfigError(
                f'metric "{name}" is unknown.{did_you_mean(name, METRICS)} Metrics: {", ".join(METRICS)}.'
            )
    from lorasmith.bases import load_base
    from lorasmith.data import read_records

    records = read_records(data)
    loaded = load_base(base, dtype=dtype, quantize=quantize)
    tuned = load_tuned(adapter, loaded, allow_base_mismatch=allow_base_mismatch) if adapter else None
    result: dict[str, Any] = dict.fromkeys(("loss", "perplexity", "bleu", "exact_match", "accuracy"))
    result["n"] = len(records)
    if "loss" in wanted:
        result["loss"], result["perplexity"] = measure_loss(loaded, records, tuned, max_length=max_length)
    if set(wanted) - {"loss"}:
        outputs = answer(loaded, records, tuned, max_tokens=max_tokens)
        result |= _text_scores(wanted, outputs, records)
    if as_json:
        print_json(result)
    else:
        print(
            "  ".join(
                f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                for k, v in result.items()
                if v is not None
            )
        )


def measure_loss(
    base: Base, records: RecordSet, adapter: Adapter | Tuned | None, *, max_length: int
) -> tuple[float, float]:
    """Mean loss per supervised token, and its exponential."""
    from lorasmith.data import encode
    from lorasmith.train import Forward, evaluate_loss

    examples = encode(records, base.tokenizer, max_length=max_length).examples
    with put_on(base.model, adapter):
        found = evaluate_loss(Forward(base.model), examples)
    return found.loss, found.perplexity


def answer(base: Base, records: RecordSet, adapter: Adapter | Tuned | None, *, max_tokens: int) -> list[str]:
    """Greedy answers to every record's prompt."""
    from lorasmith.baselines import Tuned
    from lorasmith.engine import Engine

    if isinstance(adapter, Tuned):
        with put_on(base.model, adapter):
            return _answers(method_engine(base, adapter), records, base, None, max_tokens)
    engine, name = Engine(base), None
    if adapter is not None:
        name = "tuned"
        engine.add_adapter(name, adapter)
    return _answers(engine, records, base, name, max_tokens)


def _answers(engine: Engine, records: RecordSet, base: Base, name: str | None, max_tokens: int) -> list[str]:
    from lorasmith.data import render_prompt
    from lorasmith.engine import Request

    try:
        requests = [
            Request(render_prompt(record, base.tokenizer), adapter=name, max_tokens=max_tokens)
            for record in records
        ]
        return [result.text.strip() for result in engine.generate(requests)]
    finally:
        engine.close()


def _text_scores(wanted: list[str], outputs: list[str], records: RecordSet) -> dict[str, float]:
    from lorasmith import scoring
    from lorasmith.data import references

    gold = [references(record) for record in records]
    names = {"bleu": "bleu", "chrf": "chrf", "exact-match": "exact_match", "accuracy": "accuracy"}
    return {key: getattr(scoring, key)(outputs, gold) for name, key in names.items() if name in wanted}
