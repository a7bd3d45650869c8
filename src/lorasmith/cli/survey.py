"""What `lorasmith merge` shows before anything is written: how much of an update each format would keep."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from lorasmith.analysis import SurvivalReport
    from lorasmith.bases import Base
    from lorasmith.lora import Adapter

WORST_SHOWN = 3


def survey(base: Base, adapter: Adapter) -> dict[str, Any]:
    """Survival in the base's dtype, by module, and over all modules in every format that there is."""
    import torch

    from lorasmith.analysis import StorageName, survival_report
    from lorasmith.inject import base_matrices, check_fit

    check_fit(base.model, adapter)
    weights = base_matrices(base.model, adapter)
    with torch.no_grad():
        own = survival_report(weights, adapter, base.model.dtype)
        formats = {name: survival_report(weights, adapter, name) for name in get_args(StorageName)}
    return {
        "survival": survival_values(own),
        "formats": {
            name: {"kept": r.kept, "relative_error": r.relative_error} for name, r in formats.items()
        },
    }


def survival_values(report: SurvivalReport) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    modules = {path: asdict(module) for path, module in report.modules.items()}
    return {"kept": report.kept, "relative_error": report.relative_error, "modules": modules}


def show_survey(result: dict[str, Any], dtype: str) -> None:
    """A line for each format, then the modules that lose most in the base's dtype."""
    print("format  kept    relative error of the update")
    for name, found in result["formats"].items():
        print(f"{name:<7} {found['kept']:>6.1%}  {found['relative_error']:.2%}")
    modules = result["survival"]["modules"].items()
    worst = sorted(modules, key=lambda item: -item[1]["relative_error"])[:WORST_SHOWN]
    print(f"most is lost in {dtype.removeprefix('torch.')} by:")
    for path, found in worst:
        print(f"  {path}  kept {found['kept']:.1%}, error {found['relative_error']:.2%}")
    print("nothing was written; give --out to merge")
