"""Does the update amplify directions that the base does little with? (paper, §7.3, table 7)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lorasmith.analysis import amplification
from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.learning.rank import QV, described, tuned_ranks
from lorasmith.claims.learning.sizes import LONG, QUICK, long_sizes
from lorasmith.claims.learning.subspaces import LARGE, SMALL
from lorasmith.drawing import BLUE, GREY, ORANGE, label, panels
from lorasmith.formats import read_adapter

MATRIX = "q_proj"
MOST, HALF = 0.9, 0.5
"""Shares of the layers in which the claim must stand to hold, and to be left open."""


def measure(setting: Setting) -> Measured:
    """Table 7 for every layer's q, at two ranks."""
    tuned = tuned_ranks(setting, long_sizes(setting), QV)
    runs = {rank: tuned[rank].runs[0].folder for rank in (SMALL, LARGE)}

    def compute() -> dict[int, list[dict[str, Any]]]:
        setting.say("amplification: singular directions of the base's weights")
        base = setting.load()
        found = {}
        for rank, folder in runs.items():
            factors = read_adapter(folder / "adapter").factors
            paths = [path for path in factors if path.endswith(MATRIX)]
            weights = [base.model.get_submodule(path).get_parameter("weight") for path in paths]
            pairs = zip(weights, paths, strict=True)
            found[rank] = [_plain(amplification(weight, factors[path])) for weight, path in pairs]
        return found

    key = {"what": "amplification", "runs": [folder.name for folder in runs.values()]}
    return judge({int(rank): rows for rank, rows in setting.cached(key, compute).items()})


def _plain(found: Any) -> dict[str, Any]:
    names = ("delta_norm", "weight_norm", "on_delta", "on_weight", "on_random", "factor")
    return {name: getattr(found, name) for name in names}


def judge(found: Mapping[int, Sequence[Mapping[str, float]]]) -> Measured:
    """Holds if random < ΔW < W, and a factor that falls with the rank, stand in nine layers of ten; not if in under half."""
    ordered = {
        rank: sum(x["on_random"] < x["on_delta"] < x["on_weight"] for x in layers) / len(layers)
        for rank, layers in found.items()
    }
    factors = {rank: median(x["factor"] for x in layers) for rank, layers in found.items()}
    small, large = min(found), max(found)
    pairs = zip(found[small], found[large], strict=True)
    falls = sum(a["factor"] > b["factor"] for a, b in pairs) / len(found[small])
    least = min(*ordered.values(), falls)
    verdict = Holds.YES if least >= MOST else Holds.NO if least < HALF else Holds.NOT_AT_THIS_SCALE
    rows = [
        {"rank": rank, "‖UᵀWV‖ on ΔW": median(x["on_delta"] for x in layers), "on W": median(x["on_weight"] for x in layers),
         "random": median(x["on_random"] for x in layers), "‖ΔW‖": median(x["delta_norm"] for x in layers),
         "‖W‖": median(x["weight_norm"] for x in layers), "‖ΔW‖ / ‖UᵀWV‖": factors[rank], "in order": f"{ordered[rank]:.0%}"}
        for rank, layers in found.items()
    ]  # fmt: skip
    said = (
        f"In q of {ordered[small]:.0%} (r={small}) and {ordered[large]:.0%} (r={large}) of the {len(found[small])} layers, W has "
        f"more on ΔW's directions than on random ones and less than on its own. The factor ‖ΔW‖ / ‖UᵀWV‖ is {factors[small]:.2g} "
        f"at r={small} and {factors[large]:.2g} at r={large} (median; it is larger at the smaller rank in {falls:.0%} of the "
        "layers). Its size depends on how long one trains."
    )
    return Measured(
        verdict, said, {"layers": {str(r): [dict(x) for x in xs] for r, xs in found.items()}}, rows
    )


def draw(measured: Measured, out: Path) -> None:
    """The three projections by layer, and the factor."""
    layers = measured.figures["layers"]
    with panels(out, len(layers) + 1, height=3.9) as every:
        for panel, (rank, rows) in zip(every, layers.items(), strict=False):
            for key, colour, name in (
                ("on_weight", GREY, "W's own"), ("on_delta", BLUE, "ΔW's"), ("on_random", ORANGE, "random"),
            ):  # fmt: skip
                panel.plot(
                    [row[key] for row in rows], color=colour, linewidth=1.8, label=f"{name} directions"
                )
            panel.set_yscale("log")
            label(panel, f"how much of W lies on {rank} directions", "layer (q)", "‖UᵀWV‖")
            panel.legend(frameon=False, fontsize=8)
        for colour, (rank, rows) in zip((BLUE, ORANGE), layers.items(), strict=False):
            every[-1].plot([row["factor"] for row in rows], color=colour, linewidth=1.8, label=f"r={rank}")
        every[-1].axhline(1, color=GREY, linewidth=1, zorder=0)
        every[-1].set_yscale("log")
        label(every[-1], "amplification", "layer (q)", "‖ΔW‖ / ‖UᵀWV‖")
        every[-1].legend(frameon=False, fontsize=8)


CLAIM = Claim(
    id="amplification",
    title="The update amplifies what the base has but does not emphasise",
    claim="ΔW is more correlated with W than a random matrix is, but not with W's top directions; it amplifies directions "
    "that are in W without emphasis, and the more so the smaller the rank.",
    source="Hu et al. 2021, §7.3, table 7",
    design=f"‖UᵀWV‖ of every layer's q with U, V the top directions of ΔW, of W, and random ones, at r={SMALL} and r={LARGE}, "
    f"from the runs of the rank claim. Full: {described(LONG)}. Quick: {described(QUICK)}. It holds if random < ΔW < W in "
    "90 % of the layers at both ranks and the factor ‖ΔW‖ / ‖UᵀWV‖ is larger at the smaller rank in 90 %; not, if in under half.",
    expected="GPT-3, layer 48: 0.02 (random), 0.32 (ΔW), 21.67 (W) at r=4; 0.33, 1.90, 37.71 at r=64; factor 21.5 and 1.9.",
    measure=measure,
    draw=draw,
)
