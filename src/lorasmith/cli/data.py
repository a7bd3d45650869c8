"""`lorasmith data check`: what the model will really be trained on."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import BaseOption, JsonOption, print_json, say

if TYPE_CHECKING:
    from lorasmith.data import Report

app = typer.Typer(no_args_is_help=True, help="Look at training data before it is used.")
SHOWN_PER_KIND = 5


@app.callback()
def data() -> None:
    """Look at training data before it is used."""


@app.command("check")
def check_data(
    file: Annotated[Path, typer.Argument(help="JSONL, CSV, TSV or Parquet.")],
    base: BaseOption,
    max_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    against: Annotated[
        Path | None, typer.Option(help="Held-out records, which should share no question with FILE.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to look at.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show masks, lengths and problems; exits with 1 if there are any."""
    from lorasmith.bases import load_tokenizer
    from lorasmith.data import check

    report = check(file, load_tokenizer(base), max_length=max_length, against=against)
    if html is not None:
        from lorasmith.cli.data_page import data_page
        from lorasmith.train import write_atomically

        write_atomically(html, data_page(report, source=str(file), base=base, max_length=max_length))
        say(f"page: {html}")
    problems = [{"line": p.line, "kind": p.kind, "message": p.message} for p in report.problems]
    if as_json:
        print_json({"records": report.records, "supervised_tokens": report.supervised_tokens, "problems": problems,
                    "stats": asdict(report.stats), "labels": report.labels})  # fmt: skip
    else:
        _print(report)
    if problems:
        raise typer.Exit(1)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.text import Text

    console, s = Console(highlight=False), report.stats
    console.print(
        f"{report.records} records, {s.examples} examples, {s.tokens:,} tokens, of which "
        f"{s.supervised_tokens:,} ({s.supervised_tokens / s.tokens:.0%}) carry loss; longest {s.longest}, "
        f"{s.truncated_examples} prompts cut"
    )
    if report.labels is not None:
        top = ", ".join(f"{name!r} {count}" for name, count in list(report.labels.items())[:5])
        console.print(f"looks like classification with {len(report.labels)} labels: {top}", markup=False)
    view = Text("first example, what carries loss in green: ")
    for text, supervised in report.preview:
        view.append(text, style="bold green" if supervised else "dim")
    console.print(view)
    shown: Counter[str] = Counter()
    for problem in report.problems:
        shown[problem.kind] += 1
        if shown[problem.kind] <= SHOWN_PER_KIND:
            console.print(f"line {problem.line}: {problem.kind}: {problem.message}", markup=False)
    for kind, count in shown.items():
        if count > SHOWN_PER_KIND:
            console.print(f"… {count - SHOWN_PER_KIND} more of {kind}", markup=False)
    console.print(f"{len(report.problems)} problems" if report.problems else "no problems found")
