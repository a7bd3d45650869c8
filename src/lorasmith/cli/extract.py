"""`lorasmith extract`: a LoRA from a full fine-tune, one tensor of each model in memory at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.derive import (
    OutOption,
    PlotOption,
    derived_from,
    progress_bar,
    read_base_config,
    require_new,
)
from lorasmith.cli.options import BaseOption, JsonOption, print_json, say

# Architectures of transformers that are built of `Conv1D`, whose weights are stored (in, out).
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
SHOWN = 6


def extract(
    base: BaseOption,
    tuned: Annotated[str, typer.Option(help="The fine-tuned model: a local directory or built-in name.")],
    out: OutOption,
    rank: Annotated[int | None, typer.Option(help="Rank of every module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Least rank that keeps this share of ‖tuned − base‖² in each module.")
    ] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Best low-rank approximation of tuned − base for every linear layer, and what it leaves out."""
    from lorasmith.analysis import extract_from_full, open_tensors
    from lorasmith.bases import base_directory, fingerprint_directory
    from lorasmith.cli import plots
    from lorasmith.formats import write_adapter

    plot = require_new(out, plot)
    before, after = base_directory(base), base_directory(tuned)
    tensors = open_tensors(before)
    with progress_bar("extract", "tensors") as progress:
        adapter, errors = extract_from_full(
            tensors, open_tensors(after), rank=rank, energy=energy,
            transposed=conv1d_paths(before, tensors), progress=progress,
        )  # fmt: skip
    provenance: dict[str, Any] = {
        "base": {"name": base, "fingerprint": fingerprint_directory(before).to_dict()}, "base_name": base,
        **derived_from("extract", {}, {"rank": rank, "energy": energy, "tuned": tuned}),
    }  # fmt: skip
    provenance["made_by"]["from"] = [{"path": tuned, "fingerprint": fingerprint_directory(after).to_dict()}]
    adapter = replace(adapter, provenance=provenance)
    write_adapter(adapter, out)
    plots.draw_extraction(errors, f"{tuned} − {base}", plot)
    result = {
        "relative_error": errors.relative_error, "captured": errors.captured,
        "rank": max(f.rank for f in adapter.factors.values()), "bytes": adapter.num_bytes,
        "modules": [{"path": p, "rank": adapter.factors[p].rank, "relative_error": e} for p, e in errors.modules.items()],
        "not_captured": errors.not_captured, "out": str(out), "plot": str(plot), "digest": adapter.digest,
    }  # fmt: skip
    if as_json:
        print_json(result)
        return
    print(f"{out}: {len(errors.modules)} modules, rank {result['rank']}, relative error {errors.relative_error:.2%}; "
          f"{errors.captured:.1%} of ‖tuned − base‖² is in the adapter, {adapter.num_bytes / 1e6:.1f} MB")  # fmt: skip
    for name, why in list(errors.not_captured.items())[:SHOWN]:
        say(f"  not in it: {name}: {why}")
    if len(errors.not_captured) > SHOWN:
        say(f"  … and {len(errors.not_captured) - SHOWN} more tensors: --json lists them")
    say(f"plot: {plot}")


def conv1d_paths(directory: Path, names: Any) -> list[str]:
    """Modules whose weights are stored (in, out), told by the model's config and their names."""
    if read_base_config(directory).get("model_type") not in CONV1D_MODELS:
        return []
    paths = (name.removesuffix(".weight") for name in names)
    return [path for path in paths if path.rpartition(".")[2] in CONV1D_NAMES]
