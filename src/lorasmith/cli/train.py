"""`lorasmith train`: one adapter from a data file, or what another method leaves."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.methods import (
    BiasesOption,
    BottleneckOption,
    DimensionOption,
    InitTextOption,
    PrefixHiddenOption,
    ProjectionOption,
    SaidOption,
    TopLayersOption,
    VirtualTokensOption,
    with_method_options,
)
from lorasmith.cli.options import JsonOption, QuantizeOption, parse_bytes, print_json, say
from lorasmith.errors import ConfigError, did_you_mean

TOP_LEVEL = ("base", "data", "eval_data", "out", "dtype", "quantize", "lora", "train")
INTERRUPTED = 130


def train(
    base: Annotated[str | None, typer.Option(help="Local directory, built-in name or hub id.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL, CSV, TSV or Parquet.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the adapter, metrics and plot.")] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out records; the best adapter on them is kept.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML run file; flags override it.")] = None,
    rank: Annotated[int | None, typer.Option(help="Default 16.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scaling is alpha/rank. Default 32.")] = None,
    targets: Annotated[str | None, typer.Option(help='"all-linear", a,b,c (suffixes), or re:REGEX.')] = None,
    exclude: Annotated[str | None, typer.Option(help="As --targets, taken away from them.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the low-rank branch. Default 0.")] = None,
    bias: Annotated[str | None, typer.Option(help="none, lora_only or all.")] = None,
    rslora: Annotated[bool | None, typer.Option(help="Scaling alpha/√rank.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="lora, full, houlsby, lin, prefix, prompt, bitfit, top-k or intrinsic."),
    ] = None,
    bottleneck: BottleneckOption = None,
    virtual_tokens: VirtualTokensOption = None,
    prefix_hidden: PrefixHiddenOption = None,
    init_text: InitTextOption = None,
    biases: BiasesOption = None,
    top_layers: TopLayersOption = None,
    dimension: DimensionOption = None,
    projection: ProjectionOption = None,
    said: SaidOption = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default from the width.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Default 1.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per optimizer step. Default 8.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per forward pass. Default 2048.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per sequence. Default 1024.")] = None,
    packing: Annotated[str | None, typer.Option(help="auto, none, plain or tree.")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, block, inductor or plain.")] = None,
    recompute: Annotated[str | None, typer.Option(help="auto, none, mlp or layers.")] = None,
    offload: Annotated[str | None, typer.Option(help="none, activations, weights or all.")] = None,
    budget: Annotated[str | None, typer.Option(help="Largest peak of memory, such as 2GiB.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="Under torchrun, what is spread over the processes: none, base or all.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of factors, order and dropout. Default 0.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32.")] = None,
    quantize: QuantizeOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False,
    auto: Annotated[
        bool, typer.Option("--auto", help="Decide rank, learning rate and memory by measuring first.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train one adapter."""
    flags = dict(locals())
    run = read_run_file(config) if config else {}
    lora = run.get("lora", {}) | given(flags, "rank", "alpha", "dropout", "bias", "rslora")
    for name in ("targets", "exclude"):
        if flags[name] is not None:
            lora[name] = parse_targets(flags[name])
    settings = run.get("train", {}) | given(
        flags, "method", "lr", "epochs", "max_steps", "batch_size", "batch_tokens", "max_length", "packing",
        "kernels", "recompute", "offload", "shard", "eval_every", "save_every", "seed",
    )  # fmt: skip
    settings = with_method_options(settings, flags)
    if budget is not None:
        settings["budget_bytes"] = parse_bytes(budget)
    places = {k: run.get(k) for k in TOP_LEVEL[:6]} | given(
        flags, "base", "data", "eval_data", "out", "dtype", "quantize"
    )
    missing = [f"--{name}" for name in ("base", "data", "out") if places.get(name) is None]
    if missing:
        raise ConfigError(f"train: {', '.join(missing)} not given, neither as a flag nor in the run file.")
    if auto and resume:
        raise ConfigError("--auto decides anew, and --resume keeps what was decided: give one of them.")
    _run(places, lora, settings, auto=auto, resume=resume, as_json=as_json)


def _run(
    places: dict[str, Any],
    lora: dict[str, Any],
    settings: dict[str, Any],
    *,
    auto: bool,
    resume: bool,
    as_json: bool,
) -> None:
    from lorasmith.bases import load_base
    from lorasmith.lora import LoRAConfig
    from lorasmith.train import TrainConfig, world
    from lorasmith.train import train as run_training

    lora_config, train_config = LoRAConfig.from_dict(lora), TrainConfig.from_dict(settings)
    with world() as here:
        if auto and here.size > 1:
            raise ConfigError(
                "--auto measures with one process, and torchrun started several. Run it alone, then give these "
                "processes what it chose (its run.json)."
            )
        device = here.device if here.size > 1 and train_config.shard == "none" else "cpu"
        base = load_base(
            str(places["base"]), dtype=places["dtype"] or "auto", device=device, quantize=places["quantize"]
        )
        decisions = None
        if auto:
            from lorasmith.cli.auto import decide

            asked = {*lora, *settings}
            lora_config, train_config, decisions = decide(
                base, Path(places["data"]), lora_config, train_config, given=asked
            )
        result = run_training(
            base, places["data"], lora_config, train_config,
            out=places["out"], eval_data=places["eval_data"], resume=resume,
        )  # fmt: skip
        del base  # a sharded one would keep the process group beyond its end
    if as_json and here.is_first:
        print_json(result.to_dict() | ({"decisions": decisions} if auto else {}))
    elif here.is_first and not result.interrupted:
        best = f", evaluation loss {result.eval_loss:.4f}" if result.eval_loss is not None else ""
        say(f"done: training loss {result.train_loss:.4f}{best}, {result.tokens_per_s:,.0f} tokens/s")
        print(result.adapter_dir)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def parse_targets(text: str) -> str | list[str]:
    """`all-linear`, `re:REGEX`, or suffixes with commas between them."""
    if text == "all-linear":
        return text
    return text[3:] if text.startswith("re:") else [part.strip() for part in text.split(",") if part.strip()]


def given(flags: dict[str, Any], *names: str) -> dict[str, Any]:
    """The flags of these names that were set."""
    return {name: flags[name] for name in names if flags[name] is not None}


def read_run_file(path: Path) -> dict[str, Any]:
    """A TOML run file with known keys only."""
    try:
        run = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The run file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The run file {path} is not valid TOML: {error}.") from error
    unknown = [key for key in run if key not in TOP_LEVEL]
    if unknown:
        lines = [f'"{key}" is not a key of a run file.{did_you_mean(key, TOP_LEVEL)}' for key in unknown]
        raise ConfigError(f"{path}:\n  " + "\n  ".join(lines) + f"\n  keys: {', '.join(TOP_LEVEL)}")
    return run
