"""Do adapters of different rank and seed find the same directions? (paper, §7.2)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lorasmith.analysis import overlap_grid, subspace_overlap
from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.learning.rank import QV, described, rank_arms, tuned_ranks
from lorasmith.claims.learning.sizes import LONG, QUICK, long_sizes
from lorasmith.claims.learning.spread import Interval, all_of, mean_interval
from lorasmith.drawing import label, panels
from lorasmith.formats import read_adapter
from lorasmith.lora import Adapter

SMALL, LARGE = 8, 64
SHARED = 0.5
"""φ of the first directions that the paper calls shared."""
SHOWN = 16
"""Directions of the large rank that a map shows in full; more would only be paler."""


def measure(setting: Setting) -> Measured:
    """φ between ranks 8 and 64, and between two seeds of rank 64; A starts from another seed on each side."""
    s = long_sizes(setting)
    key = {
        "what": "subspaces",
        "runs": [a.name for a in rank_arms(s, QV).values()],
        "seeds": list(s.seeds),
    }
    tuned = tuned_ranks(setting, s, QV)
    key["rates"] = [tuned[SMALL].lr, tuned[LARGE].lr]

    def compute() -> dict[str, Any]:
        small, large, other = (
            read_adapter(o.folder / "adapter") for o in (tuned[SMALL].runs[0], tuned[LARGE].runs[1], tuned[LARGE].runs[0])
        )  # fmt: skip
        return overlaps(small, large, other)

    return judge(setting.cached(key, compute))


def overlaps(small: Adapter, large: Adapter, other: Adapter) -> dict[str, Any]:
    """Matrix → φ of the first directions by layer, mean maps, and what chance gives."""
    kinds: dict[str, list[str]] = {}
    for path in small.factors:
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    found: dict[str, Any] = {}
    for kind, paths in kinds.items():
        of_ranks = [overlap_grid(small, large, p, side="left") for p in paths]
        of_seeds = [overlap_grid(large, other, p, side="left") for p in paths]
        inputs = [overlap_grid(small, large, p, side="right") for p in paths]
        found[kind] = {
            "first": [grid[0, 0].item() for grid in of_ranks],
            "first_between_seeds": [grid[0, 0].item() for grid in of_seeds],
            "first_of_inputs": [grid[0, 0].item() for grid in inputs],
            "first_of_A": [_first_of_A(small, large, p) for p in paths],
            "map": _mean(of_ranks, SHOWN),
            "map_between_seeds": _mean(of_seeds, SHOWN),
            "chance": 1 / small.factors[paths[0]].out_features,
            "map_by_chance": _chance(small.factors[paths[0]].out_features, SMALL, LARGE, layers=len(paths)),
        }
    return found


def _first_of_A(a: Adapter, b: Adapter, path: str) -> float:
    """φ(1, 1) of the right singular vectors of the factors A, which the paper looks at."""
    first, second = (torch.linalg.svd(x.factors[path].A.double(), full_matrices=False)[2].T for x in (a, b))
    return subspace_overlap(first, second, 1, 1)


def _mean(grids: Sequence[Tensor], columns: int) -> list[list[float]]:
    rows, width = min(g.shape[0] for g in grids), min(g.shape[1] for g in grids)
    mean = torch.stack([g[:rows, :width].double() for g in grids]).mean(0)[:columns, :columns]
    return [[round(v, 4) for v in row] for row in mean.tolist()]


def _chance(size: int, rank: int, other: int, *, layers: int) -> list[list[float]]:
    """The mean map of two Gaussian matrices, drawn as often as there are layers."""
    random = torch.Generator().manual_seed(0)
    grids = []
    for _ in range(layers):
        U, V = (torch.linalg.qr(torch.randn(size, r, generator=random, dtype=torch.float64)).Q for r in (rank, min(other, size)))  # fmt: skip
        squares = (U.T @ V).square().cumsum(0).cumsum(1)
        i, j = torch.arange(1, squares.shape[0] + 1)[:, None], torch.arange(1, squares.shape[1] + 1)[None]
        grids.append(squares / torch.minimum(i, j))
    return _mean(grids, SHOWN)


def judge(found: Mapping[str, Any]) -> Measured:
    """Holds if the first directions overlap by more than a half, on q and on v; fails if chance could do it."""
    firsts = {kind: mean_interval(values["first"]) for kind, values in found.items()}
    verdict = all_of(*(_shared(firsts[kind], found[kind]["chance"]) for kind in found))
    rows = [
        {"matrix": kind, "φ(1,1) r=8 and r=64": str(firsts[kind]), "two seeds of r=64": str(mean_interval(v["first_between_seeds"])),
         "on ΔW's inputs": f"{fmean(v['first_of_inputs']):.3f}", "on A, as the paper": f"{fmean(v['first_of_A']):.3f}",
         "chance": f"{v['chance']:.4f}"}
        for kind, v in found.items()
    ]  # fmt: skip
    shares = "; ".join(
        f"{kind} {firsts[kind].mean:.2f} ± {firsts[kind].half:.2f}, {firsts[kind].mean / v['chance']:.0f} times what chance gives"
        for kind, v in found.items()
    )  # fmt: skip
    all_in = "; ".join(
        f"{kind} {v['map'][-1][-1]:.2f} (chance {v['map_by_chance'][-1][-1]:.2f})"
        for kind, v in found.items()
    )
    of_A = "; ".join(f"{kind} {fmean(v['first_of_A']):.2f}" for kind, v in found.items())
    said = (
        f"The first output direction of ΔW at rank 8 and at rank 64, from different seeds, overlaps by {shares} (mean over "
        f"the layers, 95 % interval). All eight directions within the first {SHOWN} of rank 64: {all_in}. Of the "
        f"factors A, which the paper plots, the first overlaps by {of_A}: A begins at random and moves little in a training "
        "this short, while the outputs (B) are all learned."
    )
    return Measured(verdict, said, dict(found), rows)


def _shared(first: Interval, chance: float) -> Holds:
    if first.low > SHARED:
        return Holds.YES
    return Holds.NO if first.low <= 3 * chance else Holds.NOT_AT_THIS_SCALE


def draw(measured: Measured, out: Path) -> None:
    """Mean maps over the layers: ranks, seeds, chance; a row for each matrix."""
    found = measured.figures
    with panels(out, 3, rows=len(found), height=3.4) as every:
        for row, (kind, values) in enumerate(found.items()):
            shown = (
                ("map", f"{kind}: r=8 and r=64", "direction of r=8"), ("map_between_seeds", f"{kind}: two seeds of r=64", "direction, one seed"),
                ("map_by_chance", "two Gaussian matrices", "direction"),
            )  # fmt: skip
            for column, (key, title, y) in enumerate(shown):
                panel, grid = every[3 * row + column], values[key]
                image = panel.imshow(
                    grid, cmap="magma", vmin=0, vmax=1, origin="lower", aspect="auto",
                    extent=(0.5, len(grid[0]) + 0.5, 0.5, len(grid) + 0.5),
                )  # fmt: skip
                panel.figure.colorbar(image, ax=panel, fraction=0.046, pad=0.03)
                label(
                    panel,
                    f"{title}, mean of the layers",
                    "direction of r=64" if column < 2 else "direction",
                    y,
                )


CLAIM = Claim(
    id="subspaces",
    title="Different ranks and seeds find the same first direction",
    claim="The top singular direction of the update is shared between rank 8 and rank 64 (φ > 0.5), and between seeds; the "
    "other directions are mostly noise, and random matrices share none.",
    source="Hu et al. 2021, §7.2, figures 3 and 4",
    design="φ(i, j) = ‖Uᵢᵀ Vⱼ‖² / min(i, j) of the singular directions of ΔW in q and v, every layer, on the output side, "
    f"with different seeds of A on the two sides, and Gaussian matrices as the control. Full: {described(LONG)}. Quick: "
    f"{described(QUICK)}. It holds if φ(1, 1) is above 0.5 with 95 % confidence over the layers, for q and v; it does "
    "not if that is within three times chance.",
    expected="GPT-3, layer 48 of 96: φ(1, 1) > 0.5 for ΔWq and ΔWv between r=8 and r=64; none for random Gaussians.",
    measure=measure,
    draw=draw,
)
