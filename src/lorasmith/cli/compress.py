"""`lorasmith compress`: the closest adapter of a lower rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from lorasmith.cli.derive import AdapterArgument, OutOption, PlotOption, derived_from, read_any, require_new
from lorasmith.cli.options import JsonOption, print_json, say


def compress(
    adapter: AdapterArgument,
    out: OutOption,
    rank: Annotated[int | None, typer.Option(help="Largest rank of a module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Least rank that keeps this share of ‖delta‖² in each module.")
    ] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Best low-rank re-expression of each delta (Eckart–Young), through QR of the factors."""
    from lorasmith.analysis import relative_error, spectra, truncate
    from lorasmith.cli import plots
    from lorasmith.formats import write_adapter

    plot = require_new(out, plot)
    before = read_any(adapter)
    after = truncate(before, rank=rank, energy=energy)
    made_by = derived_from("compress", {str(adapter): before}, {"rank": rank, "energy": energy})
    after = replace(after, provenance=after.provenance | made_by)
    error = relative_error(before, after)
    write_adapter(after, out)
    plots.draw_compression(spectra(before), after, error, f"{adapter} → {out}", plot)
    ranks = [f.rank for f in after.factors.values()]
    result = {
        "rank_before": max(f.rank for f in before.factors.values()), "rank_after": max(ranks),
        "mean_rank_after": sum(ranks) / len(ranks), "relative_error": error.overall,
        "bytes_before": before.num_bytes, "bytes_after": after.num_bytes,
        "modules": [{"path": p, "rank": after.factors[p].rank, "relative_error": e} for p, e in error.modules.items()],
        "out": str(out), "plot": str(plot), "digest": after.digest,
    }  # fmt: skip
    if as_json:
        print_json(result)
        return
    ranks_text = f"rank {result['rank_before']} → {result['rank_after']}"
    if min(ranks) != max(ranks):
        ranks_text += f" at most, {result['mean_rank_after']:.1f} on average"
    print(f"{out}: {ranks_text}, relative error {error.overall:.2%}, "
          f"{before.num_bytes / 1e6:.1f} MB → {after.num_bytes / 1e6:.1f} MB")  # fmt: skip
    say(f"plot: {plot}")
