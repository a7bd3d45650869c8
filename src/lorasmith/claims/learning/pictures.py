"""Curves over sizes, as the plots of this room draw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorasmith.drawing import SOFT

GREEN = "#2f855a"


def points_with_spread(
    panel: Any, curve: Mapping[int, Sequence[float]], colour: str, name: str, *, sd: float | None = None
) -> None:
    """A line through the means, a dot for each run, and a bar of one standard deviation on either side."""
    x = list(curve)
    means = [sum(v) / len(v) for v in curve.values()]
    panel.errorbar(
        x, means, yerr=sd, color=colour, linewidth=1.8, marker="o", markersize=5, capsize=3, label=name
    )
    for at, values in curve.items():
        if len(values) > 1:
            panel.scatter([at] * len(values), values, s=12, color=colour, alpha=0.45, linewidths=0, zorder=3)


def size_axis(panel: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each of these values."""
    panel.set_xscale("log")
    panel.set_xticks(list(values), [f"{v:g}" for v in values])
    panel.minorticks_off()


def level(panel: Any, value: float, text: str, *, colour: str = SOFT) -> None:
    """A dashed horizontal line with its name at the right end."""
    panel.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    panel.annotate(
        text, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
        ha="right", fontsize=8, color=colour,
    )  # fmt: skip
