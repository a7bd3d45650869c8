"""Answers of each run's adapter, and of its base, to a few prompts: written beside the run for the viewer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lorasmith.cli.run_folder import RunFolder
from lorasmith.errors import ConfigError

SHOWN, MAX_TOKENS = 5, 96


def write_samples(found: Sequence[RunFolder], data: Path) -> None:
    """`samples.jsonl` in every finished run of LoRA; the adapters of one base answer in one batch.

    Raises:
        ConfigError: no record of `data` has a prompt.
    """
    from lorasmith.bases import load_base
    from lorasmith.cli.options import load_adapter
    from lorasmith.data import read_records, references, render_prompt
    from lorasmith.engine import Engine, Request
    from lorasmith.train import write_atomically

    records = [record for record in read_records(data) if references(record)][:SHOWN]
    if not records:
        raise ConfigError(
            f"{data}: no record has a prompt and an answer, so there is nothing to ask the runs."
        )
    finished = [run for run in found if (run.path / "adapter").is_dir()]
    for name in dict.fromkeys(run.record["base"] for run in finished):
        base = load_base(name)
        runs = [run for run in finished if run.record["base"] == name]
        prompts = [render_prompt(record, base.tokenizer) for record in records]
        engine = Engine(base)
        try:
            for k, run in enumerate(runs):
                engine.add_adapter(f"run{k}", load_adapter(run.path / "adapter", base))
            who = [None, *(f"run{k}" for k in range(len(runs)))]
            asked = [Request(ids, adapter=a, max_tokens=MAX_TOKENS) for a in who for ids in prompts]
            texts = [result.text.strip() for result in engine.generate(asked)]
        finally:
            engine.close()
        before = texts[: len(records)]
        for k, run in enumerate(runs, 1):
            rows = [
                {
                    "prompt": base.tokenizer.decode(ids),
                    "wanted": references(record)[0],
                    "base": old,
                    "tuned": new,
                }
                for record, ids, old, new in zip(
                    records, prompts, before, texts[k * len(records) : (k + 1) * len(records)], strict=True
                )
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(run.path / "samples.jsonl", lines)
