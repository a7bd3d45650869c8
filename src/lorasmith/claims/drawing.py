"""The look that all plots share: one figure, a title line, light axes, colours that differ for every eye."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK, SOFT, GREY = "#1b2430", "#6b7685", "#c9d1db"
TEAL, BLUE, ORANGE, PURPLE = "#1f6f5c", "#1f4e9c", "#c2410c", "#6650a4"
COLOURS = (TEAL, BLUE, ORANGE, PURPLE, "#b58b00", "#a0357a", "#2f8fb3", "#5b6570")


@contextmanager
def figure(path: Path, columns: int = 1, *, height: float = 3.4) -> Iterator[Any]:
    """Axes side by side, (columns,); written to `path` as PNG on leaving."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(1, columns, figsize=(9, height), squeeze=False, layout="constrained")
    try:
        yield axes[0]
        made.savefig(path, dpi=150, facecolor="white")
    finally:
        pyplot.close(made)


def label(panel: Any, title: str, x: str = "", y: str = "") -> None:
    """Title and axis labels, and only the spines that carry numbers."""
    panel.set_title(title, loc="left", fontsize=10, color=INK)
    panel.set_xlabel(x, fontsize=9, color=SOFT)
    panel.set_ylabel(y, fontsize=9, color=SOFT)
    panel.tick_params(labelsize=8, colors=SOFT)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
