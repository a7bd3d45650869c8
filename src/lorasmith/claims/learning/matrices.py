"""Which matrices to adapt when the number of parameters is fixed? (paper, table 5)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorasmith.bases import load_skeleton
from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.learning.rank import described
from lorasmith.claims.learning.runs import Arm, Tuned, tune
from lorasmith.claims.learning.sizes import FULL, QUICK, sizes
from lorasmith.claims.learning.spread import Interval, all_of, below, difference, pooled
from lorasmith.drawing import BLUE, ORANGE, label, panels
from lorasmith.inject import resolve_targets
from lorasmith.lora import LoRAConfig

ATTENTION: dict[str, tuple[str, ...]] = {
    "q": ("q_proj",),
    "v": ("v_proj",),
    "o": ("o_proj",),
    "q, v": ("q_proj", "v_proj"),
    "q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
BEYOND: dict[str, str | tuple[str, ...]] = {
    "MLP": ("gate_proj", "up_proj", "down_proj"),
    "all linear": "all-linear",
}
QUICK_ARMS = ("q", "q, v", "q, k, v, o", "MLP")
LEAST, MOST = 4, 8
"""Rank of the four attention matrices together, among which the budget is looked for."""


def params_per_rank(base: str, targets: str | Sequence[str]) -> int:
    """Σ (in + out) over the modules that `targets` names in `base`; no weight is loaded."""
    model = load_skeleton(base).model
    chosen = resolve_targets(
        model, LoRAConfig(targets=targets if isinstance(targets, str) else tuple(targets))
    )
    return sum(sum(module.get_parameter("weight").shape) for module in chosen.chosen.values())


def budget_ranks(costs: Mapping[str, int], attention: Sequence[str]) -> tuple[int, dict[str, int]]:
    """Parameters that all attention arms can have as equally as may be, and each arm's nearest rank to it.

    Args:
        costs: arm → parameters of one unit of its rank.
        attention: the arms to be made equal; the last of them, with the most matrices, sets the budget.
    """

    def ranks(budget: int) -> dict[str, int]:
        return {name: max(1, round(budget / cost)) for name, cost in costs.items()}

    def mismatch(budget: int) -> float:
        return max(abs(r * costs[n] / budget - 1) for n, r in ranks(budget).items() if n in attention)

    budget = min((costs[attention[-1]] * r for r in range(LEAST, MOST + 1)), key=mismatch)
    return budget, ranks(budget)


def matrix_arms(setting: Setting) -> dict[str, Arm]:
    """Name of the matrices → its run, all of about the same number of parameters."""
    s, every = sizes(setting), ATTENTION | BEYOND
    wanted = {name: every[name] for name in (QUICK_ARMS if setting.quick else every)}
    costs = {name: params_per_rank(setting.base, targets) for name, targets in wanted.items()}
    _, ranks = budget_ranks(costs, [name for name in ATTENTION if name in wanted])
    return {
        name: Arm("lora", s.pairs, s.steps, s.held_out, rank=ranks[name], targets=targets)
        for name, targets in wanted.items()
    }


def tuned_matrices(setting: Setting) -> dict[str, Tuned]:
    """Name of the matrices → its runs at its best rate."""
    s, arms = sizes(setting), matrix_arms(setting)
    found = tune(setting, arms.values(), s.rates, s.seeds)
    return {name: found[arm] for name, arm in arms.items()}


def measure(setting: Setting) -> Measured:
    """Losses of the same number of parameters on different matrices."""
    return judge(tuned_matrices(setting), {name: arm.rank for name, arm in matrix_arms(setting).items()})


def judge(found: Mapping[str, Tuned], ranks: Mapping[str, int]) -> Measured:
    """Holds if both q, v together and all four beat q alone; says where MLP stands."""
    spread = pooled(t.losses for t in found.values())
    against_q = {n: difference(t.losses, found["q"].losses, spread) for n, t in found.items() if n != "q"}
    mlp = difference(found["MLP"].losses, found["q, k, v, o"].losses, spread)
    verdict = all_of(*(below(against_q[name], 0.0) for name in ("q, v", "q, k, v, o")))
    rows = [
        {"matrices": n, "rank": ranks[n], "parameters": t.runs[0].params, "learning rate": t.lr, "loss": t.mean,
         "losses": list(t.losses), "less than q alone": str(against_q[n]) if n != "q" else "–"}
        for n, t in found.items()
    ]  # fmt: skip
    said = (
        f"Against q alone ({found['q'].mean:.3f}): q, v {against_q['q, v']}, all four {against_q['q, k, v, o']} nats per "
        f"token (95 % interval, {spread.freedom} repeats). Beyond the paper: MLP against all four {mlp}, so the MLP, "
        f"which it never tried, is {_placed(mlp)}."
    )
    return Measured(verdict, said, {"sd_of_a_run": spread.sd, "base_loss": found["q"].base_loss}, rows)


def _placed(against: Interval) -> str:
    verdict = below(against, 0.0)
    return {Holds.YES: "better", Holds.NO: "worse"}.get(verdict, "not to be told apart")


def draw(measured: Measured, out: Path) -> None:
    """Loss of each set of matrices."""
    rows, sd = list(measured.rows), measured.figures["sd_of_a_run"]
    with panels(out) as (panel,):
        for y, row in enumerate(rows):
            colour = BLUE if row["matrices"] in ATTENTION else ORANGE
            panel.errorbar(row["loss"], y, xerr=sd, color=colour, marker="o", markersize=7, capsize=3)
            panel.scatter(row["losses"], [y] * len(row["losses"]), s=14, color=colour, alpha=0.45, zorder=3)
        names = [f"{r['matrices']}\nr={r['rank']}, {r['parameters'] / 1e3:,.0f} k" for r in rows]
        panel.set_yticks(range(len(rows)), names)
        panel.invert_yaxis()
        panel.grid(axis="x", alpha=0.2)
        label(panel, "held-out loss on an equal budget; orange: not in the paper", "nats per token", "")


CLAIM = Claim(
    id="which-matrices",
    title="On a fixed budget, more kinds of matrices at a lower rank",
    claim="With the number of parameters fixed, adapting q and v together, or all four attention matrices, beats putting "
    "the whole budget into q.",
    source="Hu et al. 2021, §7.1, table 5",
    design="The ranks are computed from the base's shapes so that all attention arms have the same number of parameters "
    "(SmolLM2-135M: 691,200 each, r=20 on q to r=6 on all four); MLP and all linear layers get the nearest rank. "
    f"Full: {described(FULL)}. Quick: {', '.join(QUICK_ARMS)}; {described(QUICK)}. It holds if q, v and all four are below q alone with 95 % "
    "confidence each.",
    expected="GPT-3, 18 M parameters, WikiSQL ± 0.5 / MNLI ± 0.1: q 70.4/91.0, v 73.0/91.0, o 73.2/91.3, q, v 73.7/91.3, "
    "all four 73.7/91.7. MLP was not tried.",
    measure=measure,
    draw=draw,
)
