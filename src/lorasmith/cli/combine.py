"""`lorasmith combine`: several adapters of one base as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.derive import (
    OutOption,
    PlotOption,
    derived_from,
    progress_bar,
    read_any,
    require_new,
    shared_base,
)
from lorasmith.cli.options import JsonOption, print_json, say
from lorasmith.errors import ConfigError


def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Two or more adapter directories.")],
    out: OutOption,
    weights: Annotated[
        list[str] | None, typer.Option(help="One for each, as 0.7,0.3; 1,-1 subtracts. Default 1 for all.")
    ] = None,
    method: Annotated[str, typer.Option(help="sum, concat, svd, ties or dare.")] = "sum",
    rank: Annotated[int | None, typer.Option(help="For svd, ties and dare. Default: the largest.")] = None,
    density: Annotated[float | None, typer.Option(help="Share kept by ties (0.2) and dare (0.5).")] = None,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Combine adapters of different bases.")
    ] = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Weighted sum without cross terms, or a merge by elements; the error is measured and said."""
    from lorasmith import analysis
    from lorasmith.cli import plots
    from lorasmith.formats import write_adapter

    plot = require_new(out, plot)
    if len(set(adapters)) < 2:
        raise ConfigError(f"combine: {len(set(adapters))} different adapter given; give at least two.")
    numbers = parse_weights(weights, len(adapters))
    parts = [read_any(path) for path in adapters]
    sources = dict(zip(map(str, adapters), parts, strict=False))
    base = shared_base(sources, allow_mismatch=allow_base_mismatch)
    with progress_bar("combine", "modules") as progress:
        made = analysis.combine(
            parts, numbers, method=method, rank=rank, density=density, seed=seed, progress=progress,  # type: ignore[arg-type]
        )  # fmt: skip
    settings = {
        "weights": numbers, "method": method, "rank": rank, "density": density,
        "seed": seed if method == "dare" else None,
    }  # fmt: skip
    result_adapter = replace(made.adapter, provenance=base | derived_from("combine", sources, settings))
    write_adapter(result_adapter, out)
    plots.draw_combination(
        sources, numbers, result_adapter, f"{out}: {method}, relative error {made.relative_error:.1e}", plot
    )
    result = {
        "relative_error": made.relative_error, "rank": made.rank, "weights": numbers, "method": method,
        "base_verified": bool(base), "out": str(out), "plot": str(plot), "digest": result_adapter.digest,
    }  # fmt: skip
    if as_json:
        print_json(result)
        return
    print(
        f"{out}: {method} of {len(parts)} adapters, rank {made.rank}, relative error {made.relative_error:.2e}"
    )
    say(f"plot: {plot}")


def parse_weights(given: list[str] | None, count: int) -> list[float]:
    """Numbers from `--weights 0.7,0.3` or `--weights 0.7 --weights 0.3`.

    Raises:
        ConfigError: not numbers, or not one for each adapter.
    """
    if given is None:
        return [1.0] * count
    texts = [part.strip() for text in given for part in text.split(",") if part.strip()]
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        raise ConfigError(
            f"--weights {','.join(given)}: use numbers with commas between them, as 0.7,0.3."
        ) from None
    if len(numbers) != count:
        raise ConfigError(
            f"--weights: {len(numbers)} given for {count} adapters; give one for each, as 0.7,0.3."
        )
    return numbers
