"""`lorasmith runs`: list and compare training runs, in the terminal and on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.options import JsonOption, print_json, say
from lorasmith.errors import ConfigError


def runs(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or one that holds several.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Records whose first prompts every run answers, for the page.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write TensorBoard event files here (needs the package tensorboard).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List runs with their results and what differs between their settings."""
    from lorasmith.cli.run_folder import differences, find_runs

    found = find_runs(folder)
    if not found:
        raise ConfigError(
            f"{folder} holds no run: no run.json in it or in its sub-folders. Name a folder that train wrote."
        )
    if samples is not None:
        from lorasmith.cli.run_samples import write_samples

        write_samples(found, samples)
        found = find_runs(folder)
    different = differences(found)
    if html is not None:
        from lorasmith.cli.runs_page import runs_page
        from lorasmith.train import write_atomically

        write_atomically(html, runs_page(found, different, title=str(folder)))
        say(f"page: {html}")
    if tensorboard is not None:
        _write_events(found, tensorboard)
    if as_json:
        print_json({"runs": [run.to_dict() for run in found], "differences": different})
    else:
        _print(found, different)


def _print(found: list[Any], different: dict[str, list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("run")
    for name in ("steps", "loss", "eval loss", "tokens/s", "memory"):
        table.add_column(name, justify="right")
    for key in different:
        table.add_column(key.removeprefix("train.").removeprefix("lora."), justify="right", style="cyan")
    for i, run in enumerate(found):
        extra = (str(values[i]) for values in different.values())
        table.add_row(
            run.name, run.progress, *(run.shown[k] for k in ("loss", "eval_loss", "rate", "memory")), *extra
        )
    Console(highlight=False).print(table)


def _write_events(found: list[Any], out: Path) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            '--tensorboard needs the package tensorboard: pip install "lorasmith[tensorboard]".'
        ) from error
    for run in found:
        writer = SummaryWriter(str(out / run.name))
        for row in run.rows:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    writer.add_scalar(key, value, row["step"])
        writer.close()
    say(f"TensorBoard: tensorboard --logdir {out}")
