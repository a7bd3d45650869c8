"""`lorasmith sweep`: many adapters on one base in one process, ranked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import BaseOption, JsonOption, QuantizeOption, print_json, say
from lorasmith.cli.train import INTERRUPTED, parse_targets

if TYPE_CHECKING:
    from lorasmith.sweep import SweepResult


def sweep(
    base: BaseOption,
    data: Annotated[Path, typer.Option(help="JSONL, CSV, TSV or Parquet.")],
    out: Annotated[Path, typer.Option(help="Folder; each run gets one of its own in it.")],
    grid: Annotated[str, typer.Option(help="'lr=5e-4,1e-3,2e-3;rank=4,16': a run for each combination.")],
    eval_data: Annotated[
        Path | None,
        typer.Option(help="Records to rank the runs on. Default: a tenth of the data is held out."),
    ] = None,
    halving: Annotated[
        int | None,
        typer.Option(help="Early stopping: at each rung one run in this many goes on. Default: none."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of all runs, as in `train`; so are the next.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Default 32.")] = None,
    targets: Annotated[str | None, typer.Option(help='"all-linear", a,b,c (suffixes), or re:REGEX.')] = None,
    dropout: Annotated[float | None, typer.Option(help="Default 0.")] = None,
    lr: Annotated[float | None, typer.Option(help="Default from the width.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Default 1.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps of each run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per optimizer step. Default 8.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per shared pass. Default 2048.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per sequence. Default 1024.")] = None,
    packing: Annotated[str | None, typer.Option(help="auto, none, plain or tree.")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, block or plain.")] = None,
    recompute: Annotated[str | None, typer.Option(help="none, mlp or layers.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default 0.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    quantize: QuantizeOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train one adapter for each combination of a grid, sharing every pass through the base."""
    flags = dict(locals())
    lora = {k: flags[k] for k in ("rank", "alpha", "dropout") if flags[k] is not None}
    if targets is not None:
        lora["targets"] = parse_targets(targets)
    names = ("lr", "epochs", "max_steps", "batch_size", "batch_tokens", "max_length", "packing", "kernels",
             "recompute", "eval_every", "save_every", "seed")  # fmt: skip
    train = {k: flags[k] for k in names if flags[k] is not None}
    _run(flags, lora, train, as_json=as_json)


def _run(flags: dict[str, Any], lora: dict[str, Any], train: dict[str, Any], *, as_json: bool) -> None:
    from lorasmith.sweep import parse_grid, points

    made = points(parse_grid(flags["grid"]), lora, train)  # a wrong grid is told before the base is loaded

    from lorasmith.bases import load_base
    from lorasmith.sweep import Halving
    from lorasmith.sweep import sweep as run_sweep
    from lorasmith.train import world

    halving = None if flags["halving"] is None else Halving(flags["halving"])
    with world() as here:
        device = here.device if here.size > 1 else "cpu"
        result = run_sweep(
            load_base(flags["base"], dtype=flags["dtype"], device=device, quantize=flags["quantize"]),
            flags["data"], made, out=flags["out"], eval_data=flags["eval_data"], halving=halving, resume=flags["resume"],
        )  # fmt: skip
    if as_json and here.is_first:
        print_json(result.to_dict())
    elif here.is_first and not result.interrupted:
        _print(result)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _print(result: SweepResult) -> None:
    width = max(len(run["name"]) for run in result.runs)
    print(f"{'run':<{width}}  held-out  training  steps")
    for run in result.runs:
        losses = "  ".join(
            f"{'–' if v is None else format(v, '.4f'):>8}" for v in (run["eval_loss"], run["train_loss"])
        )
        status = "" if run["status"] == "done" else f"  {run['status']}"
        print(f"{run['name']:<{width}}  {losses}  {run['steps']:>5}{status}")
    if result.best is not None:
        print(f"\nbest: {result.runs[0]['adapter_dir']}")
    if result.plot is not None:
        print(f"plot: {result.plot}")
    say(f"{len(result.runs)} runs in {result.wall_s:,.0f} s, peak {result.peak_rss_bytes / 1e9:.1f} GB")
