"""Panels in one figure: light axes, a title each, colours that differ for every eye."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasmith.errors import OutputError

INK, SOFT, GREY = "#1b2430", "#6b7685", "#c9d1db"
TEAL, BLUE, ORANGE, PURPLE = "#1f6f5c", "#1f4e9c", "#c2410c", "#6650a4"
COLOURS = (TEAL, BLUE, ORANGE, PURPLE, "#b58b00", "#a0357a", "#2f8fb3", "#5b6570")


@contextmanager
def panels(
    out: Path, columns: int = 1, *, rows: int = 1, width: float = 5.6, height: float = 4.1, title: str = ""
) -> Iterator[list[Any]]:
    """Panels (matplotlib's axes), left to right and top to bottom, that become the PNG `out` at the end of the `with`.

    Args:
        width, height: of one panel, in inches.
        title: over all of them.

    Raises:
        OutputError: `out` cannot be written; what was there stays.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=130, squeeze=False, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.png")
    try:
        yield [panel for row in axes for panel in row]
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary)
        os.replace(temporary, out)
    except OSError as error:
        raise OutputError(f"the plot {out} cannot be written: {error.strerror or error}") from error
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)


def label(panel: Any, title: str, x: str = "", y: str = "") -> None:
    """Title and names of the axes, and only the spines that carry numbers."""
    panel.set_title(title, loc="left", fontsize=10, color=INK)
    panel.set_xlabel(x, fontsize=9, color=SOFT)
    panel.set_ylabel(y, fontsize=9, color=SOFT)
    panel.tick_params(labelsize=8, colors=SOFT)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
