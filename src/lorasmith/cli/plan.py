"""`lorasmith plan`: memory, disk and time of a run, for full fine-tuning and LoRA, before anything is spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import (
    BaseOption,
    DtypeOption,
    JsonOption,
    QuantizeOption,
    parse_bytes,
    print_json,
    say,
)
from lorasmith.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from lorasmith.cli.planned import Planned
    from lorasmith.planning import Machine


def plan(
    base: BaseOption,
    data: Annotated[Path, typer.Option(help="JSONL, CSV, TSV or Parquet.")],
    budget: Annotated[
        str | None, typer.Option(help="Memory to stay within, such as 8GiB; default: what is free here.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="A GPU by name, such as RTX4090; default: this machine.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML run file, as train takes it; flags override it.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the factors. Default 16.")] = None,
    targets: Annotated[str | None, typer.Option(help='"all-linear", a,b,c (suffixes), or re:REGEX.')] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per optimizer step. Default 8.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per forward pass. Default 2048.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per sequence. Default 1024.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data. Default 1.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many optimizer steps.")] = None,
    packing: Annotated[str | None, typer.Option(help="auto, none, plain or tree.")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, block, inductor or plain.")] = None,
    recompute: Annotated[str | None, typer.Option(help="auto, none, mlp or layers.")] = None,
    offload: Annotated[str | None, typer.Option(help="none, activations, weights or all.")] = None,
    processes: Annotated[int, typer.Option(help="That train together, as under torchrun.", min=1)] = 1,
    shard: Annotated[
        str | None, typer.Option(help="What is spread over the processes: none, base or all.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run six real steps to calibrate the time.")
    ] = False,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory, disk and time; no weight is loaded unless --measure asks for it."""
    flags = dict(locals())
    from lorasmith.cli.planned import Planned, measured_factor
    from lorasmith.cli.train import given, parse_targets, read_run_file
    from lorasmith.lora import LoRAConfig
    from lorasmith.planning import known_device, this_machine
    from lorasmith.train import TrainConfig, limit_kept_kernels

    if measure and device:
        raise ConfigError("--measure runs on this machine; it cannot calibrate a device that is not here.")
    if measure and processes > 1:
        raise ConfigError("--measure runs steps in this process alone; leave it out, or --processes.")
    limit = parse_bytes(budget) if budget else None
    run = read_run_file(config) if config else {}
    asked = run.get("lora", {}) | given(flags, "rank")
    lora = LoRAConfig.from_dict(asked | ({"targets": parse_targets(targets)} if targets else {}))
    settings = TrainConfig.from_dict(run.get("train", {}) | given(
        flags, "batch_size", "batch_tokens", "max_length", "epochs", "max_steps", "packing",
        "kernels", "recompute", "offload", "shard",
    ))  # fmt: skip
    if quantize and (measure or settings.shard != "none"):
        raise ConfigError("--quantize goes with neither --measure nor --shard; leave one of them out.")
    if measure:
        limit_kept_kernels()  # as `train` does, and before this process multiplies anything
    settings = replace(settings, budget_bytes=limit)
    planned = Planned.read(base, data, lora, settings, dtype=dtype, quantize=quantize, processes=processes)
    machine = known_device(device) if device else this_machine(planned.dtype, processes=processes)
    factor = measured_factor(planned, machine, base, data, dtype=dtype) if measure else 1.0
    result, fits = _result(planned, machine, limit, factor)
    if as_json:
        print_json(result)
    else:
        _print(planned, machine, result, measured=measure)
    if not fits:
        raise typer.Exit(1)


def _result(
    planned: Planned, machine: Machine, limit: int | None, factor: float
) -> tuple[dict[str, Any], bool]:
    """The JSON object, and whether anything fits."""
    lora, full = planned.estimate(machine, "lora", factor), planned.estimate(machine, "full", factor)
    try:
        recommended: dict[str, Any] = planned.fit(machine, limit, factor).to_dict()
    except BudgetError as error:
        recommended = {"reason": str(error), "fits": False}
    result = {
        "lora": lora.to_dict(),
        "full": full.to_dict(),
        "recommended": recommended,
        "machine": {"name": machine.name, "memory_bytes": machine.memory_bytes, "note": machine.note},
        "steps": planned.steps,
        "layout": {"packing": planned.layout.packing, "reason": planned.layout.reason},
    }
    return result, "rank" in recommended


def _print(planned: Planned, machine: Machine, result: dict[str, Any], *, measured: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    for name, side in (("", "left"), ("LoRA", "right"), ("full fine-tuning", "right"), ("", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for row in planned.rows(result["lora"], result["full"]):
        table.add_row(*row)
    console = Console(highlight=False)
    stats = planned.encoded.stats
    console.print(
        f"{planned.name}: {planned.decoder.params:,} parameters; {stats.examples} examples, {stats.tokens:,} tokens, "
        f"{planned.steps} steps; packing {planned.layout.packing} ({planned.layout.reason})",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    console.print(f"{machine.name}: {machine.note}", markup=False, soft_wrap=True)
    console.print(table)
    if not measured:
        say("time is first-principles arithmetic on measured rates; --measure calibrates it with real steps")
    found = result["recommended"]
    if "rank" not in found:
        console.print(found["reason"], markup=False)
        return
    flags = " ".join(
        f"--{name.replace('_', '-')} {found[name]}"
        for name in ("rank", "batch_tokens", "max_length", "recompute")
    )
    console.print(f"recommended: {flags}\n  {found['reason']}", markup=False, soft_wrap=True)
