"""`lorasmith merge`: a plain model with the adapter folded in, if enough of it survives the rounding."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import BaseOption, JsonOption, MismatchOption, load_adapter, print_json, probe_ids
from lorasmith.cli.survey import show_survey, survey, survival_values
from lorasmith.errors import MergeLossError, OutputError

if TYPE_CHECKING:
    import torch

    from lorasmith.analysis import SurvivalReport
    from lorasmith.bases import Base
    from lorasmith.lora import Adapter

LARGEST_ERROR = 0.5
"""Relative error of the merged update beyond which `merge` refuses: half of it would be noise."""


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory.")],
    base: BaseOption,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the merged model. Without it only the survival is shown.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the merged model: auto, bf16, fp16 or fp32.")] = "auto",
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="nf4 or int8: merge into what these codes stand for.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Merge although the rounding eats the update.")
    ] = False,
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a plain model; refuses when the update does not survive the rounding."""
    from lorasmith.bases import load_base
    from lorasmith.quantised import dequantise_linears

    if out is not None and out.exists():
        raise OutputError(f"{out} exists already. Choose another folder; nothing was written.")
    loaded = load_base(base, dtype=dtype, quantize=quantize)
    tuned = load_adapter(adapter, loaded, allow_base_mismatch=allow_base_mismatch)
    if quantize is not None:
        dequantise_linears(loaded.model)
    if out is None:
        result = survey(loaded, tuned)
        print_json(result) if as_json else show_survey(result, str(loaded.model.dtype))
        return
    report, difference = _fold(loaded, tuned, force=force)
    _write(loaded, out)
    result = {"survival": survival_values(report), "max_abs_logit_diff": difference, "out": str(out)}
    if as_json:
        print_json(result)
    else:
        print(f"{out}: {report.kept:.1%} of the update kept, relative error {report.relative_error:.2%}, "
              f"largest difference of a logit {difference:.3g}")  # fmt: skip


def _fold(base: Base, adapter: Adapter, *, force: bool) -> tuple[SurvivalReport, float]:
    """Merge into the live model, unless too little would survive; also the largest change of a logit by it."""
    import torch

    from lorasmith.analysis import survival_report
    from lorasmith.inject import base_matrices, eject, inject
    from lorasmith.inject import merge as fold

    probe = probe_ids(base)
    with torch.no_grad():
        inject(base.model, adapter)
        unmerged = base.model(probe).logits.float()
        eject(base.model)
        report = survival_report(base_matrices(base.model, adapter), adapter, base.model.dtype)
        _refuse_if_lost(report, base.model.dtype, force=force)
        fold(base.model, adapter)
        return report, float((base.model(probe).logits.float() - unmerged).abs().max())


def _refuse_if_lost(report: SurvivalReport, dtype: torch.dtype, *, force: bool) -> None:
    if report.relative_error <= LARGEST_ERROR or force:
        return
    name = str(dtype).removeprefix("torch.")
    instead = "" if name == "float32" else "Merge with --dtype fp32, serve"
    path, worst = max(report.modules.items(), key=lambda item: item[1].relative_error)
    raise MergeLossError(
        f"Merging into {name} would keep {report.kept:.0%} of the update with a relative error "
        f"of {report.relative_error:.0%} (limit {LARGEST_ERROR:.0%}); nothing was written.\n"
        f"  worst module: {path}, error {worst.relative_error:.0%}\n"
        f"  {instead or 'Serve'} the adapter unmerged, or insist with --force."
    )


def _write(base: Base, out: Path) -> None:
    from safetensors import SafetensorError

    from lorasmith.bases import write_base

    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_base(base, temporary)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{out} could not be written: {error}. Nothing was kept.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
