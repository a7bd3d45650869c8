"""The picture of the claim: each method's score on each task, seed by seed, against what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.claims.claim import Measured
from lorasmith.claims.quality.statistics import spread

COLOURS = {"lora": "#0b6e4f", "full": "#b0413e"}
ORDER = ("base", "tf-idf", "bitfit", "prefix", "houlsby", "full", "lora")
SHORT = {
    "base": "untuned", "tf-idf": "TF-IDF, SVM", "bitfit": "BitFit", "prefix": "prefix", "houlsby": "Houlsby",
    "full": "full", "lora": "LoRA",
}  # fmt: skip


def draw(measured: Measured, path: Path) -> None:
    """One panel a task: a bar for the mean, a dot for each seed, the trained parameters beside the name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = {name: part for name, part in measured.figures.items() if isinstance(part, dict)}
    figure = Figure(figsize=(max(5.2, 3.9 * len(tasks)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, (task, part) in zip(axes, tasks.items(), strict=True):
        _panel(axis, task, part)
    figure.savefig(path, dpi=150)


def _panel(axis: Any, task: str, part: dict[str, Any]) -> None:
    names = [name for name in ORDER if name in part["scores"]]
    for place, name in enumerate(names):
        values = [run[part["headline"]] for run in part["scores"][name]]
        colour = COLOURS.get(name, "#8a8f98")
        axis.barh(place, spread(values)[0], color=colour, alpha=0.45, height=0.62)
        axis.plot(values, [place] * len(values), "o", color=colour, markersize=4.5, markeredgecolor="white")
    axis.set_yticks(range(len(names)), [_label(name, part) for name in names])
    axis.set(title=task, xlabel=part["headline"])
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)


def _label(name: str, part: dict[str, Any]) -> str:
    costs = part["costs"].get(name)
    return SHORT[name] + (f"\n{_count(costs[0]['params'])}" if costs else "")


def _count(params: int) -> str:
    return f"{params / 1e6:.3g} M" if params >= 1e6 else f"{params / 1e3:.3g} k"
