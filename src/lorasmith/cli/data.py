"""`lorasmith data check`: what the model will really be trained on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import BaseOption, JsonOption, print_json

app = typer.Typer(no_args_is_help=True, help="Look at training data before it is used.")


@app.callback()
def data() -> None:
    """Look at training data before it is used."""


@app.command("check")
def check_data(
    file: Annotated[Path, typer.Argument(help="JSONL, CSV, TSV or Parquet.")],
    base: BaseOption,
    max_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    as_json: JsonOption = False,
) -> None:
    """Show masks, lengths and problems; exits with 1 if there are any."""
    from lorasmith.bases import load_tokenizer
    from lorasmith.data import check

    report = check(file, load_tokenizer(base), max_length=max_length)
    problems = [{"line": p.line, "kind": p.kind, "message": p.message} for p in report.problems]
    if as_json:
        print_json({"records": report.records, "supervised_tokens": report.supervised_tokens, "problems": problems}
                   | {"stats": asdict(report.stats)})  # fmt: skip
    else:
        _print(report)
    if problems:
        raise typer.Exit(1)


def _print(report: object) -> None:
    from rich.console import Console
    from rich.text import Text

    from lorasmith.data import Report

    assert isinstance(report, Report)
    console, s = Console(highlight=False), report.stats
    console.print(
        f"{report.records} records, {s.examples} examples, {s.tokens:,} tokens, of which "
        f"{s.supervised_tokens:,} ({s.supervised_tokens / s.tokens:.0%}) carry loss; longest {s.longest}, "
        f"{s.truncated_examples} prompts cut"
    )
    view = Text("first example, what carries loss in green: ")
    for text, supervised in report.preview:
        view.append(text, style="bold green" if supervised else "dim")
    console.print(view)
    for problem in report.problems[:50]:
        console.print(f"line {problem.line}: {problem.kind}: {problem.message}", markup=False)
    console.print(f"{len(report.problems)} problems" if report.problems else "no problems found")
