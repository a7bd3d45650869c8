"""The figure of all arms, and the sheet of reconstructions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasmith.drawing import INK, SOFT
from lorasmith.recipes.pixels.film import picture

OF_WAY = {"frozen": "#8a94a3", "full": "#1b2430", "scratch": "#c2410c"}
OF_RANKS = ("#7db4dd", "#2f7fc1", "#173f80")  # light to dark as the rank grows


def draw_arms(summary: Mapping[str, Any], path: Path) -> None:
    """Left how each arm learns, right where it ends: every seed, and their mean."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11.5, 4.6), width_ratios=(1.25, 1), constrained_layout=True
    )
    colours = _colours([row["name"] for row in summary["arms"]])
    chance = summary["random"]["mean"]
    for row in summary["arms"]:
        _draw_curve(left, row, colours[row["name"]])
    left.axhline(chance, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
    left.set(xlabel="steps of the game", ylabel="mean return of an episode", ylim=(0, None))
    left.set_xlim(0, summary["settings"]["steps"])
    left.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    left.legend(frameon=False, fontsize=9, loc="upper left")
    left.set_title("while learning: mean of the seeds, band from lowest to highest", **_TITLE)
    _draw_ends(right, summary, colours)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    seeds = len(summary["settings"]["seeds"])
    figure.suptitle(
        f"{summary['settings']['game']} from pixels, {seeds} seeds: what PPO may change of the encoder",
        x=0.01, ha="left", fontsize=13, color=INK,
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_reconstructions(sheets: Mapping[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """For each title: frames above, what the autoencoder makes of them below.

    Args:
        sheets: title → frames and reconstructions, uint8 (count, channels, side, side).
    """
    pyplot = _pyplot()
    count = max(len(frames) for frames, _ in sheets.values())
    figure = pyplot.figure(figsize=(1.15 * count + 1.0, 2.75 * len(sheets)), constrained_layout=True)
    for part, (title, pair) in zip(
        figure.subfigures(len(sheets), 1, squeeze=False)[:, 0], sheets.items(), strict=True
    ):
        part.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
        grid = part.subplots(2, count, squeeze=False)
        for row, frames, name in zip(grid, pair, ("frame", "redrawn"), strict=True):
            for axes, frame in zip(row, frames, strict=False):
                axes.imshow(picture(frame), interpolation="nearest")
            for axes in row:
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            row[0].set_ylabel(name, color=SOFT, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10, "color": SOFT}


def _draw_curve(axes: Any, row: Mapping[str, Any], colour: str) -> None:
    names = ("step", "mean", "low", "high")
    points = [p for p in zip(*(row["curve"][n] for n in names), strict=True) if None not in p]
    if points:
        step, mean, low, high = zip(*points, strict=True)
        axes.plot(step, mean, color=colour, linewidth=1.8, label=row["label"])
        axes.fill_between(step, low, high, color=colour, alpha=0.13, linewidth=0)


def _draw_ends(axes: Any, summary: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    rows = list(reversed(summary["arms"]))
    highest = max(max(row["last_returns"]) for row in rows)
    for y, row in enumerate(rows):
        colour = colours[row["name"]]
        axes.barh(y, row["mean"], height=0.62, color=colour, alpha=0.22, linewidth=0)
        axes.plot([row["mean"]] * 2, [y - 0.31, y + 0.31], color=colour, linewidth=2.5)
        axes.scatter(row["last_returns"], [y] * len(row["last_returns"]), s=26, color=colour, zorder=3)
        axes.text(max(row["last_returns"]) + 0.03 * highest, y, f"{row['mean']:.2f}", va="center", color=INK)
    chance = summary["random"]["mean"]
    axes.axvline(chance, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
    axes.text(chance, len(rows) - 0.45, f" random play {chance:.2f}", color=SOFT, fontsize=9, va="bottom")
    labels = [f"{row['label']}\n{row['encoder_params_trained']:,} params" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.set(
        xlim=(0, highest * 1.14),
        ylim=(-0.55, len(rows) - 0.1),
        xlabel="mean return over the last 100 episodes",
    )
    axes.tick_params(left=False)
    axes.set_title("at the end: each seed, and the mean", **_TITLE)


def _colours(names: list[str]) -> dict[str, str]:
    adapted = [name for name in names if name not in OF_WAY]
    last = len(OF_RANKS) - 1
    shades = {n: OF_RANKS[round(k * last / max(len(adapted) - 1, 1))] for k, n in enumerate(adapted)}
    return {name: OF_WAY.get(name) or shades[name] for name in names}


def _pyplot() -> Any:
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    return pyplot
