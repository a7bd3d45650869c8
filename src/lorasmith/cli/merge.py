"""`lorasmith merge`: a plain model with the adapter folded in, if enough of it survives the rounding."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import BaseOption, JsonOption, MismatchOption, load_adapter, print_json, probe_ids
from lorasmith.errors import MergeLossError, OutputError

if TYPE_CHECKING:
    from lorasmith.bases import Base

LARGEST_ERROR = 0.5
"""Relative error of the merged update beyond which `merge` refuses: half of it would be noise."""


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory.")],
    base: BaseOption,
    out: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    dtype: Annotated[str, typer.Option(help="Of the merged model: auto, bf16, fp16 or fp32.")] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Merge although the rounding eats the update.")
    ] = False,
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a plain model; refuses when the update does not survive the rounding."""
    import torch

    from lorasmith.analysis import survival_report
    from lorasmith.bases import load_base
    from lorasmith.inject import base_matrices, eject, inject
    from lorasmith.inject import merge as fold

    if out.exists():
        raise OutputError(f"{out} exists already. Choose another folder; nothing was written.")
    loaded = load_base(base, dtype=dtype)
    tuned = load_adapter(adapter, loaded, allow_base_mismatch=allow_base_mismatch)
    probe = probe_ids(loaded)
    with torch.no_grad():
        inject(loaded.model, tuned)
        unmerged = loaded.model(probe).logits.float()
        eject(loaded.model)
        weights = base_matrices(loaded.model, tuned)
        report = survival_report(weights, tuned, loaded.model.dtype)
        _refuse_if_lost(report.relative_error, report.kept, str(loaded.model.dtype), force=force)
        fold(loaded.model, tuned)
        difference = float((loaded.model(probe).logits.float() - unmerged).abs().max())
    _write(loaded, out)
    result: dict[str, Any] = {
        "survival": {"kept": report.kept, "relative_error": report.relative_error},
        "max_abs_logit_diff": difference, "out": str(out),
    }  # fmt: skip
    if as_json:
        print_json(result)
    else:
        print(f"{out}: {report.kept:.1%} of the update kept, relative error {report.relative_error:.2%}, "
              f"largest difference of a logit {difference:.3g}")  # fmt: skip


def _refuse_if_lost(error: float, kept: float, dtype: str, *, force: bool) -> None:
    if error > LARGEST_ERROR and not force:
        raise MergeLossError(
            f"Merging into {dtype.removeprefix('torch.')} would keep {kept:.0%} of the update with a relative error "
            f"of {error:.0%} (limit {LARGEST_ERROR:.0%}); nothing was written.\n"
            "  Merge with --dtype fp32, serve the adapter unmerged, or insist with --force."
        )


def _write(base: Base, out: Path) -> None:
    from safetensors import SafetensorError

    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        base.model.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{out} could not be written: {error}. Nothing was kept.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
