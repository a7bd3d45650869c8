"""The picture of the claim: each method's score on each task, seed by seed, against what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.claims.claim import Measured
from lorasmith.claims.drawing import BLUE, GREY, INK, SOFT, TEAL, figure, label
from lorasmith.claims.quality.statistics import spread

COLOURS = {"lora": TEAL, "full": BLUE}
ORDER = ("base", "tf-idf", "bitfit", "prefix", "houlsby", "full", "lora")
SHORT = {
    "base": "untuned", "tf-idf": "TF-IDF, SVM", "bitfit": "BitFit", "prefix": "prefix", "houlsby": "Houlsby",
    "full": "full", "lora": "LoRA",
}  # fmt: skip


def draw(measured: Measured, path: Path) -> None:
    """One panel a task: a bar for the mean, a dot for each seed, the trained parameters beside the name."""
    tasks = {name: part for name, part in measured.figures.items() if isinstance(part, dict)}
    with figure(path, len(tasks)) as panels:
        for panel, (task, part) in zip(panels, tasks.items(), strict=True):
            _bars(panel, task, part)


def _bars(panel: Any, task: str, part: dict[str, Any]) -> None:
    names = [name for name in ORDER if name in part["scores"]]
    for place, name in enumerate(names):
        values = [run[part["headline"]] for run in part["scores"][name]]
        mean, colour = spread(values)[0], COLOURS.get(name, SOFT)
        panel.barh(place, mean, color=COLOURS.get(name, GREY), alpha=0.55, height=0.62)
        panel.plot(values, [place] * len(values), "o", color=colour, markersize=5, markeredgecolor="white")
        text = f"  {mean:.1f}"
        panel.text(max(*values, mean), place, text, va="center", fontsize=8, color=INK)
    label(panel, task, part["headline"])
    panel.set_yticks(range(len(names)), [_label(name, part) for name in names])
    panel.set_xlim(0, 1.15 * panel.get_xlim()[1])


def _label(name: str, part: dict[str, Any]) -> str:
    costs = part["costs"].get(name)
    return SHORT[name] + (f"\n{_count(costs[0]['params'])}" if costs else "")


def _count(params: int) -> str:
    return f"{params / 1e6:.3g} M" if params >= 1e6 else f"{params / 1e3:.3g} k"
