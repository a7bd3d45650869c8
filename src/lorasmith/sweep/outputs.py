"""The ranking of a sweep and its picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.drawing import INK, label, panels

NAMES = {"lr": "learning rate"}
LINES = ("#1f4e9c", "#c2410c", "#3aa17e", "#a0357a", "#b58b00", "#2f8fb3", "#6650a4", "#5b6570")


def ranked(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lowest held-out loss first; runs without one last."""
    return sorted(runs, key=lambda run: math.inf if run["eval_loss"] is None else run["eval_loss"])


def cells(
    runs: Sequence[Mapping[str, Any]], varied: Mapping[str, Mapping[str, Any]], axes: Sequence[str]
) -> dict[tuple[str, ...], tuple[float, float, int]]:
    """Value of each axis → mean held-out loss over seeds, its standard deviation, and how many seeds.

    Where the grid varies more than the axes and the seed, the best of the rest stands for each cell. Runs
    that halving stopped have not had all their steps and are left out.
    """
    by_setting: dict[tuple[tuple[str, ...], tuple[str, ...]], list[float]] = {}
    for run in runs:
        if run["eval_loss"] is None or run["status"] != "done":
            continue
        own = varied[run["name"]]
        place = tuple(_text(own[axis]) for axis in axes)
        rest = tuple(f"{k}={_text(v)}" for k, v in own.items() if k not in axes and k != "seed")
        by_setting.setdefault((place, rest), []).append(run["eval_loss"])
    best: dict[tuple[str, ...], tuple[float, float, int]] = {}
    for (place, _), losses in by_setting.items():
        found = (statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0, len(losses))
        best[place] = min(best.get(place, (math.inf, 0.0, 0)), found)
    return best


def plot_sweep(
    runs: Sequence[Mapping[str, Any]], varied: Mapping[str, Mapping[str, Any]], out: Path
) -> Path | None:
    """Heat map of the held-out loss over the two chief axes, and lines with their spread over seeds.

    None where nothing is varied but the seed, or no run came to its end.
    """
    axes = _axes(varied)
    found = cells(runs, varied, axes) if axes else {}
    if not found:
        return None
    values = [_in_order(varied, axis) for axis in axes]
    with panels(out, len(axes), width=6.2, height=4.4, title=_title(runs, varied, axes)) as drawn:
        if len(axes) == 2:
            _heat_map(drawn[0], found, axes, values)
        _lines(drawn[-1], found, axes, values)
    return out


def _axes(varied: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """At most two keys: the learning rate and the rank if they vary, else those of the most values."""
    first = next(iter(varied.values()))
    counts = {key: len(_in_order(varied, key)) for key in first if key != "seed"}
    keys = [key for key in counts if counts[key] > 1]
    return sorted(keys, key=lambda k: (k != "lr", k != "rank", -counts[k]))[:2]


def _in_order(varied: Mapping[str, Mapping[str, Any]], axis: str) -> list[str]:
    values = [own[axis] for own in varied.values()]
    if all(isinstance(v, int | float) for v in values):
        values.sort()
    return list(dict.fromkeys(map(_text, values)))


def _heat_map(panel: Any, found: Mapping[tuple[str, ...], tuple[float, float, int]], axes: Sequence[str],
              values: Sequence[Sequence[str]]) -> None:  # fmt: skip
    grid = [[found.get((x, y), (math.nan, 0.0, 0))[0] for x in values[0]] for y in values[1]]
    ordered = sorted(v for row in grid for v in row if not math.isnan(v))
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    # one bad rate would leave the rest one colour, so the scale ends at the median's double distance
    high = min(high, low + 2 * (middle - low)) if middle > low else high
    image = panel.imshow(
        grid, cmap="viridis_r", vmin=low, vmax=max(high, low + 1e-9), aspect="auto", origin="lower"
    )
    cut = "max" if high < ordered[-1] else "neither"
    panel.figure.colorbar(image, ax=panel, fraction=0.046, pad=0.03, extend=cut)
    panel.set_xticks(range(len(values[0])), values[0])
    panel.set_yticks(range(len(values[1])), values[1])
    for (x, y), (mean, spread, count) in found.items():
        dark = (mean - low) / max(high - low, 1e-9) > 0.5
        text = f"{mean:.4f}" + (f"\n± {spread:.4f}" if count > 1 else "")
        panel.text(values[0].index(x), values[1].index(y), text, ha="center", va="center", fontsize=9,
                   color="white" if dark else INK, fontweight="bold" if mean == low else "normal")  # fmt: skip
    label(panel, "held-out loss, nats per token", *(NAMES.get(axis, axis) for axis in axes))
    panel.spines[:].set_visible(False)


def _lines(panel: Any, found: Mapping[tuple[str, ...], tuple[float, float, int]], axes: Sequence[str],
           values: Sequence[Sequence[str]]) -> None:  # fmt: skip
    for number, y in enumerate(values[1] if len(axes) == 2 else [""]):
        points = [(i, found[key]) for i, x in enumerate(values[0]) if (key := (x, y) if y else (x,)) in found]
        if not points:
            continue
        at, means, spreads = [p for p, _ in points], [f[0] for _, f in points], [f[1] for _, f in points]
        panel.errorbar(at, means, yerr=spreads if any(spreads) else None, marker="o", markersize=4, linewidth=1.6,
                       capsize=3, color=LINES[number % len(LINES)], label=f"{axes[1]} {y}" if y else None)  # fmt: skip
    panel.set_xticks(range(len(values[0])), values[0])
    most = max(count for _, _, count in found.values())
    over = f"mean and standard deviation of {most} seeds" if most > 1 else "one seed each"
    label(panel, over, NAMES.get(axes[0], axes[0]), "held-out loss")
    panel.grid(alpha=0.2)
    if len(axes) == 2:
        panel.legend(frameon=False, fontsize=8)


def _title(
    runs: Sequence[Mapping[str, Any]], varied: Mapping[str, Mapping[str, Any]], axes: Sequence[str]
) -> str:
    done = sum(run["status"] == "done" for run in runs)
    first = next(iter(varied.values()))
    rest = [k for k in first if k not in (*axes, "seed") and len(_in_order(varied, k)) > 1]
    said = f"; the best over {', '.join(rest)} in each cell" if rest else ""
    left = f" ({len(runs) - done} more did not come to their end)" if done < len(runs) else ""
    return f"{done} runs{left}, best {runs[0]['name']} at {runs[0]['eval_loss']:.4f}{said}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
