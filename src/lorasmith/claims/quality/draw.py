"""The picture of a claim: each method's score, seed by seed, beside what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.claims.claim import Measured
from lorasmith.claims.quality.statistics import spread
from lorasmith.drawing import BLUE, GREY, INK, SOFT, TEAL, label, panels

COLOURS = {"lora": TEAL, "full": BLUE}
ORDER = ("base", "tf-idf", "bitfit", "prefix", "houlsby", "full", "lora")
SHORT = {
    "base": "untuned", "tf-idf": "TF-IDF, SVM", "bitfit": "BitFit", "prefix": "prefix", "houlsby": "Houlsby",
    "full": "full", "lora": "LoRA",
}  # fmt: skip


def draw(measured: Measured, path: Path) -> None:
    """A bar for each method's mean, a dot for each seed; what it trains beside its name."""
    part: Any = measured.figures
    with panels(path, width=9, height=3.6) as (panel,):
        if not part:
            panel.text(0.5, 0.5, "measured by the full run alone", ha="center", color=SOFT)
            panel.set_axis_off()
            return
        _bars(panel, part)


def _bars(panel: Any, part: Any) -> None:
    names = [name for name in ORDER if name in part["scores"]]
    for place, name in enumerate(names):
        values = [run[part["headline"]] for run in part["scores"][name]]
        mean, colour = spread(values)[0], COLOURS.get(name, SOFT)
        panel.barh(place, mean, color=COLOURS.get(name, GREY), alpha=0.55, height=0.62)
        panel.plot(values, [place] * len(values), "o", color=colour, markersize=5, markeredgecolor="white")
        panel.text(max(*values, mean), place, f"   {mean:.1f}", va="center", fontsize=8, color=INK)
    label(panel, "mean, and each seed", part["headline"])
    panel.set_yticks(range(len(names)), [_label(name, part) for name in names])
    panel.set_xlim(0, 1.15 * panel.get_xlim()[1])


def _label(name: str, part: Any) -> str:
    costs = part["costs"].get(name)
    return SHORT[name] + (f"\n{_count(costs[0]['params'])}" if costs else "")


def _count(params: int) -> str:
    return f"{params / 1e6:.3g} M" if params >= 1e6 else f"{params / 1e3:.3g} k"
