"""The look that the plots of this room share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK, SOFT, BLUE, ORANGE, GREEN, GREY = "#1b2430", "#6b7685", "#1f4e9c", "#c2410c", "#2f855a", "#c9d1db"


@contextmanager
def panels(out: Path, columns: int, *, rows: int = 1, height: float = 3.9) -> Iterator[list[Any]]:
    """Panels, left to right and top to bottom, that become a PNG at the end of the `with`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(5.4 * columns, height * rows), dpi=130, squeeze=False, layout="constrained"
    )
    try:
        yield [panel for row in axes for panel in row]
        part = out.with_name(f".{out.name}.{os.getpid()}.png")
        figure.savefig(part)
        os.replace(part, out)
    finally:
        plt.close(figure)


def label(panel: Any, title: str, x: str, y: str) -> None:
    """Title and names of the axes; no frame."""
    panel.set_title(title, loc="left", fontsize=10, color=INK)
    panel.set_xlabel(x, fontsize=9, color=SOFT)
    panel.set_ylabel(y, fontsize=9, color=SOFT)
    panel.tick_params(labelsize=8, colors=SOFT, length=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)


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
