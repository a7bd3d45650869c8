"""Pictures of adapters as PNG files: module kinds down, layers across, one idea in each panel."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.drawing import BLUE, GREY, INK, ORANGE, SOFT, label, panels

if TYPE_CHECKING:
    from lorasmith.analysis import Comparison, ExtractErrors, RelativeError, Spectrum
    from lorasmith.lora import Adapter

KINDS = ("#1f4e9c", "#2f8fb3", "#3aa17e", "#b58b00", "#c2410c", "#a0357a", "#6650a4", "#5b6570")
MOST_KINDS = 8
_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


def draw_spectra(found: Mapping[str, Spectrum], title: str, out: Path) -> None:
    """Norm and effective rank of every module, and the shape of the spectra by kind of module."""
    with panels(out, 2, rows=2, title=title) as (norm, rank, spectrum, energy):
        norms = {path: s.frobenius_norm for path, s in found.items()}
        _heatmap(norm, norms, "size of the change, ‖ΔW‖", "Blues")
        ranks = {path: s.effective_rank for path, s in found.items()}
        top = max((s.rank for s in found.values()), default=1)
        _heatmap(rank, ranks, f"effective rank (of {top})", "YlGnBu", span=(0, top))
        _spectra_lines(spectrum, found)
        _energy_lines(energy, found)


def draw_comparison(
    a: Adapter, b: Adapter, compared: Mapping[str, Comparison], names: tuple[str, str], out: Path
) -> None:
    """Cosine of every module, the mean overlap of leading directions, and the two sizes."""
    import torch

    from lorasmith.analysis import overlap_grid

    with panels(out, 3, title=f"{names[0]}  against  {names[1]}") as axes:
        cosines = {path: c.cosine for path, c in compared.items() if c.cosine is not None}
        _heatmap(axes[0], cosines, "cosine of the two changes", "RdBu", span=(-1, 1))
        # input directions still lie near the random start of A; output directions are all learned
        grids = [overlap_grid(a, b, path, side="left").double() for path in cosines]
        shapes = {tuple(g.shape) for g in grids}
        grids = (
            [g for g in grids if tuple(g.shape) == max(shapes, key=lambda s: s[0] * s[1])] if grids else []
        )
        panel = axes[1]
        if grids:
            mean = torch.stack(grids).mean(0)
            image = panel.imshow(mean.tolist(), cmap="magma", vmin=0, vmax=max(0.1, float(mean.max())), origin="lower",
                                 extent=(0.5, mean.shape[1] + 0.5, 0.5, mean.shape[0] + 0.5), aspect="auto")  # fmt: skip
            panel.figure.colorbar(image, ax=panel, fraction=0.046, pad=0.03)
        label(
            panel, "overlap φ(i, j) of output directions, mean", "top j of the second", "top i of the first"
        )
        panel = axes[2]
        largest = max((max(c.norm_a, c.norm_b) for c in compared.values()), default=1.0) * 1.05
        panel.plot([0, largest], [0, largest], color=GREY, linewidth=1, zorder=0)
        for colour, (kind, paths) in zip(KINDS, _kinds(compared).items(), strict=False):
            points = [(compared[p].norm_a, compared[p].norm_b) for p in paths]
            panel.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.7, linewidths=0, label=kind)
        label(panel, "‖ΔW‖ of every module", "first", "second")
        panel.legend(frameon=False, fontsize=7)


def draw_compression(
    found: Mapping[str, Spectrum], after: Adapter, error: RelativeError, title: str, out: Path
) -> None:
    """What every rank would cost, with the one that was taken, and the error of every module."""
    with panels(out, 2, title=f"{title}: relative error {error.overall:.2%}") as axes:
        panel = axes[0]
        tails = tail_errors(found)
        panel.plot(range(1, len(tails) + 1), tails, color=BLUE, linewidth=1.8, marker="o", markersize=3)
        ranks = [f.rank for f in after.factors.values()]
        panel.scatter([sum(ranks) / len(ranks)], [error.overall], color=ORANGE, s=55, zorder=3)
        panel.annotate(
            f"  taken: {_ranks(ranks)}", (sum(ranks) / len(ranks), error.overall), color=ORANGE, va="bottom"
        )
        panel.set_ylim(bottom=0)
        label(
            panel, "what one rank for all modules would cost", "rank", "relative error of the whole adapter"
        )
        if min(ranks) != max(ranks):
            _heatmap(axes[1], {p: float(f.rank) for p, f in after.factors.items()}, "rank kept", "YlGnBu")
        else:
            _heatmap(axes[1], error.modules, "relative error of a module", "OrRd", span=(0, None))


def tail_errors(found: Mapping[str, Spectrum]) -> list[float]:
    """Relative error of the whole adapter when every module keeps its first r directions, r = 1, 2, …"""
    total = sum(s.frobenius_norm**2 for s in found.values())
    longest = max((len(s.singular_values) for s in found.values()), default=0)
    lost = [
        sum(float(s.singular_values[r:].double().square().sum()) for s in found.values())
        for r in range(1, longest + 1)
    ]
    return [math.sqrt(x / total) if total else 0.0 for x in lost]


def draw_combination(
    sources: Mapping[str, Adapter], weights: Sequence[float], made: Adapter, title: str, out: Path
) -> None:
    """How alike the inputs and the result are, and their sizes layer by layer."""
    from lorasmith.analysis import cosine

    named = {f"{_short(path)}\n× {w:g}": a for (path, a), w in zip(sources.items(), weights, strict=True)}
    named["result"] = made
    with panels(out, 2, title=title) as axes:
        panel, labels = axes[0], list(named)
        cosines = [[cosine(a, b) or 0.0 for b in named.values()] for a in named.values()]
        image = panel.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
        panel.figure.colorbar(image, ax=panel, fraction=0.046, pad=0.03)
        panel.set_xticks(range(len(labels)), labels, fontsize=8)
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        for i, row in enumerate(cosines):
            for j, value in enumerate(row):
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9,
                           color="white" if abs(value) > 0.6 else INK)  # fmt: skip
        panel.set_title("cosine between whole changes", loc="left", fontsize=10)
        panel = axes[1]
        for colour, (name, adapter) in zip((*KINDS[:-1], INK), named.items(), strict=False):
            is_result = adapter is made
            layers = _norm_by_layer(adapter)
            panel.plot(list(layers), list(layers.values()), label=name.replace("\n", " "),
                       color=ORANGE if is_result else colour, linewidth=2.2 if is_result else 1.4)  # fmt: skip
        panel.set_ylim(bottom=0)
        label(panel, "size by layer, before weighting", "layer", "‖ΔW‖ over the layer's modules")
        panel.legend(frameon=False, fontsize=8)


def draw_extraction(errors: ExtractErrors, title: str, out: Path) -> None:
    """The error of every module, and where the energy of tuned − base went."""
    with panels(out, 2, title=f"{title}: relative error {errors.relative_error:.2%}") as axes:
        _heatmap(axes[0], errors.modules, "relative error of a module", "OrRd", span=(0, None))
        panel = axes[1]
        # captured = 1 − (cut + outside), and cut / (captured + cut) = relative_error² within the modules
        inside = errors.captured / max(1 - errors.relative_error**2, 1e-12)
        shares = [
            ("in the adapter", errors.captured, BLUE), ("cut off by the rank", max(inside - errors.captured, 0.0), ORANGE),
            ("in other tensors", max(1 - inside, 0.0), SOFT),
        ]  # fmt: skip
        panel.barh([s[0] for s in shares], [s[1] for s in shares], color=[s[2] for s in shares], height=0.55)
        for row, (_, share, _) in enumerate(shares):
            panel.text(share + 0.01, row, f"{share:.1%}", va="center", fontsize=9, color=INK)
        panel.set_xlim(0, 1.15)
        panel.set_xticks([0, 0.25, 0.5, 0.75, 1])
        panel.invert_yaxis()
        label(panel, "where ‖tuned − base‖² is", "share", "")


def _heatmap(
    panel: Any,
    values: Mapping[str, float],
    title: str,
    colours: str,
    span: tuple[float | None, float | None] = (None, None),
) -> None:
    """Kinds of module down, layers across; where there are no layers, one column."""
    cells: dict[str, dict[int, float]] = {}
    for path, value in values.items():
        kind, layer = _place(path)
        cells.setdefault(kind, {})[layer] = value
    layers = sorted({layer for row in cells.values() for layer in row})
    grid = [[row.get(layer, math.nan) for layer in layers] for row in cells.values()]
    if grid:
        image = panel.imshow(
            grid, cmap=colours, vmin=span[0], vmax=span[1], aspect="auto", interpolation="nearest"
        )
        panel.figure.colorbar(image, ax=panel, fraction=0.046, pad=0.02)
    panel.set_yticks(range(len(cells)), list(cells), fontsize=8)
    step = max(1, len(layers) // 10)
    panel.set_xticks(range(0, len(layers), step), [str(n) if n >= 0 else "–" for n in layers[::step]])
    panel.tick_params(length=0)
    panel.set_xlabel("layer", fontsize=9, color=SOFT)
    panel.set_title(title, loc="left", fontsize=10, color=INK)
    panel.spines[:].set_visible(False)


def _spectra_lines(panel: Any, found: Mapping[str, Spectrum]) -> None:
    def relative(s: Spectrum) -> list[float]:
        top = float(s.singular_values[0]) or 1.0
        return [max(float(v) / top, 1e-4) for v in s.singular_values]

    _median_lines(panel, found, relative)
    panel.set_yscale("log")
    label(panel, "spectrum: median of the layers, band 10–90 %", "direction", "σᵢ / σ₁")
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")


def _energy_lines(panel: Any, found: Mapping[str, Spectrum]) -> None:
    _median_lines(panel, found, lambda s: [float(e) for e in s.energy])
    panel.axhline(0.99, color=GREY, linewidth=1, zorder=0)
    panel.text(1, 0.992, "99 %", color=SOFT, fontsize=8, va="bottom")
    panel.set_ylim(0, 1.05)
    label(panel, "energy in the first directions", "directions kept", "share of ‖ΔW‖²")


def _median_lines(
    panel: Any, found: Mapping[str, Spectrum], values: Callable[[Spectrum], list[float]]
) -> None:
    for colour, (kind, paths) in zip(KINDS, _kinds(found).items(), strict=False):
        rows = [values(found[path]) for path in paths]
        columns = [sorted(r[i] for r in rows if i < len(r)) for i in range(max(map(len, rows)))]
        x = range(1, len(columns) + 1)
        panel.fill_between(x, [_quantile(c, 0.1) for c in columns], [_quantile(c, 0.9) for c in columns],
                           color=colour, alpha=0.12, linewidth=0)  # fmt: skip
        panel.plot(x, [_quantile(c, 0.5) for c in columns], color=colour, linewidth=1.6, label=kind)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def _place(path: str) -> tuple[str, int]:
    """(what follows the layer number, shortened to its last part; the layer, −1 outside layers)."""
    match = _LAYER.search(path)
    return path.rpartition(".")[2], int(match[1]) if match else -1


def _kinds(paths: Mapping[str, Any]) -> dict[str, list[str]]:
    """Module kind → paths; the commonest few."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(_place(path)[0], []).append(path)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1]))[:MOST_KINDS])


def _norm_by_layer(adapter: Adapter) -> dict[int, float]:
    from lorasmith.analysis import spectra

    squares: dict[int, float] = {}
    for path, s in spectra(adapter).items():
        layer = _place(path)[1]
        squares[layer] = squares.get(layer, 0.0) + s.frobenius_norm**2
    return {layer: math.sqrt(value) for layer, value in sorted(squares.items())}


def _short(path: str) -> str:
    parts = Path(path).parts
    return "/".join(parts[-2:]) if parts[-1:] == ("adapter",) else parts[-1]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
