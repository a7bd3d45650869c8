"""Linear algebra: what a product of rank r can express, and what an adapter with a nonlinearity cannot become."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.analysis import extract_from_full
from lorasmith.baselines import Tuned, make_method, write_method
from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.mechanics.adapters import random_adapter
from lorasmith.claims.mechanics.start import random_ids
from lorasmith.drawing import COLOURS, GREY, label, panels
from lorasmith.errors import AdapterFileError
from lorasmith.formats import read_adapter
from lorasmith.lora import LoRAConfig, delta

EXACT = 1e-12
SHARES = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)
BOTTLENECK, CURVED = 16, 1e-3


def measure_rank(setting: Setting) -> Measured:
    """Best B·A of each rank for a random ΔW of every shape that the base has."""
    key = {"claim": "full rank", "version": 1, "shares": list(SHARES)}
    rows = setting.cached(key, lambda: _shapes(setting))
    whole = max(row["error at full rank"] for row in rows)
    falls = all(a > b for row in rows for a, b in zip(row["errors"], row["errors"][1:], strict=False))
    worst = max(row["error at full rank, fp32 factors"] for row in rows)
    said = (
        f"At r = min(d, k) the best B·A equals a random ΔW to {whole:.1e} of its norm in float64 ({worst:.1e} with float32 factors) for all {len(rows)} shapes of this base, and the error falls with every larger rank. "
        f"LoRA trains fewer parameters than ΔW has only below r = dk/(d+k): {', '.join(f'''{r['break-even rank']:.0f} for {r['shape']}''' for r in rows)}. Algebra; no interval. Whether training finds that B·A is another claim."
    )
    return Measured(Holds.YES if whole <= EXACT and falls else Holds.NO, said, {"largest_error": whole}, rows)


def _shapes(setting: Setting) -> list[dict[str, Any]]:
    model = setting.load().model
    linears = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.count(".") > 1]
    shapes = sorted({(int(w.shape[0]), int(w.shape[1])) for w in linears})
    return [_shape(*shape) for shape in shapes]


def _shape(d: int, k: int) -> dict[str, Any]:
    change = torch.randn(d, k, dtype=torch.float64, generator=torch.Generator().manual_seed(d * k))
    smallest = min(d, k)
    ranks = sorted({max(1, round(share * smallest)) for share in SHARES})
    zero = {"layer.weight": torch.zeros_like(change)}

    def error(rank: int, dtype: torch.dtype) -> float:
        adapter, _ = extract_from_full(
            zero, {"layer.weight": change}, rank=rank, dtype=dtype, exact_limit=smallest
        )
        left = change - delta(adapter.factors["layer"], dtype=torch.float64)
        return float(left.norm() / change.norm())

    errors = [error(rank, torch.float64) for rank in ranks]
    return {
        "shape": f"{d} × {k}",
        "ranks": ranks,
        "errors": errors,
        "error at full rank": errors[-1],
        "error at full rank, fp32 factors": error(smallest, torch.float32),
        "break-even rank": d * k / (d + k),
        "parameters of ΔW": d * k,
        "LoRA at full rank": smallest * (d + k),
    }


def draw_rank(found: Measured, path: Path) -> None:
    """Error by rank, and parameters by rank, for each shape."""
    with panels(path, 2, width=4.5, height=3) as (left, right):
        for row, colour in zip(found.rows, COLOURS, strict=False):
            left.plot(row["ranks"], row["errors"], "o-", markersize=4, color=colour, label=row["shape"])
            full = row["ranks"][-1]
            right.plot(
                [0, full],
                [0, row["LoRA at full rank"] / row["parameters of ΔW"]],
                color=colour,
                label=row["shape"],
            )
            right.plot([row["break-even rank"]], [1], "o", color=colour)
        right.axhline(1, color=GREY, linewidth=1)
        left.legend(frameon=False, fontsize=8)
        label(left, "error of the best B·A for a random ΔW", "rank", "of ‖ΔW‖")
        label(right, "parameters of LoRA, ΔW = 1 (dot: break-even)", "rank")


def measure_fold(setting: Setting) -> Measured:
    """How much of each method's change the best affine map misses, on hidden states of the base."""
    key = {"claim": "fold", "version": 1, "bottleneck": BOTTLENECK}
    rows = setting.cached(key, lambda: _folds(setting))
    by_name = {row["method"]: row["missed by the best affine map"] for row in rows}
    lora = by_name.pop("LoRA")
    refused = all(row["merge"].startswith("refused") for row in rows if row["method"] != "LoRA")
    verdict = Holds.YES if lora < 1e-6 and min(by_name.values()) > CURVED and refused else Holds.NO
    said = (
        f"On held-out hidden states the best affine map misses {lora:.1e} of LoRA's change, and {' and '.join(f'{v:.1%} of {n}´s' for n, v in by_name.items())}: what lies between their two products is no matrix, "
        f"so no W holds it, and `merge` {'refuses them' if refused else 'does not refuse them'}. Adapters with weights of a usual initial size, one layer; how curved a trained one is depends on its training."
    ).replace("´", "’")
    return Measured(verdict, said, {}, rows)


def _folds(setting: Setting) -> list[dict[str, Any]]:
    model = setting.load("fp32").model
    width = int(model.get_input_embeddings().weight.shape[1])
    x = _hidden(model, tokens=4 * (width + 1))
    rows = [
        {
            "method": "LoRA",
            "missed by the best affine map": _missed(x, _lora_change(model, x)),
            "merge": "W0 + ΔW",
        }
    ]
    for name in ("houlsby", "lin"):
        method = make_method(name, {"bottleneck": BOTTLENECK})
        method.attach(model, seed=0)
        adapter: Any = next(m for m in model.modules() if type(m).__name__ == "BottleneckAdapter")
        generator = torch.Generator().manual_seed(0)
        for linear in (adapter.down, adapter.up):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        with torch.no_grad():
            change = adapter.double()(x) - x
        adapter.float()
        tensors = {n: t.clone() for n, t in method.tensors(model).items()}
        method.detach(model)
        missed = _missed(x, change)
        rows.append(
            {
                "method": name.title(),
                "missed by the best affine map": missed,
                "merge": _merging(name, tensors),
            }
        )
    return rows


def _hidden(model: Any, tokens: int) -> Tensor:
    """Hidden states half way up, (tokens, width) in float64, each of norm √width."""
    length = min(64, int(model.config.max_position_embeddings))
    with torch.no_grad():
        states = model(
            input_ids=random_ids(model, -(-tokens // length), length),
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        ).hidden_states
    x: Tensor = states[len(states) // 2].flatten(0, 1).double()
    return x / x.square().mean(-1, keepdim=True).sqrt()


def _lora_change(model: nn.Module, x: Tensor) -> Tensor:
    adapter = random_adapter(model, LoRAConfig(rank=BOTTLENECK, alpha=BOTTLENECK))
    factors = next(f for f in adapter.factors.values() if f.in_features == x.shape[1])
    return x @ delta(factors, dtype=torch.float64).T


def _missed(x: Tensor, change: Tensor) -> float:
    """Share of ‖change‖ that the least-squares map x → Mx + b leaves on the other half of the tokens."""
    inputs = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    fit, held = slice(0, None, 2), slice(1, None, 2)
    solution = torch.linalg.lstsq(inputs[fit], change[fit], driver="gelsd").solution
    return float((inputs[held] @ solution - change[held]).norm() / change[held].norm())


def _merging(name: str, tensors: dict[str, Tensor]) -> str:
    """What reading such a folder for a merge says."""
    with tempfile.TemporaryDirectory() as scratch:
        write_method(Tuned(name, {"bottleneck": BOTTLENECK}, tensors), Path(scratch) / "it")
        try:
            read_adapter(Path(scratch) / "it")
        except AdapterFileError:
            return "refused: no factors to merge"
    return "read as an adapter"


def draw_fold(found: Measured, path: Path) -> None:
    """Share that no matrix can take over."""
    with panels(path, width=9, height=2.2) as (panel,):
        names, values = (
            [r["method"] for r in found.rows],
            [r["missed by the best affine map"] for r in found.rows],
        )
        panel.barh(names, values, color=COLOURS[: len(names)])
        for k, value in enumerate(values):
            panel.text(value, k, f" {value:.1e}", va="center", fontsize=8)
        panel.set_xscale("log")
        panel.set_xlim(1e-17, 30)
        label(panel, "share of the change that the best affine map misses, held-out hidden states")


FULL_RANK = Claim(
    id="generalises-full",
    title="With enough rank, LoRA can express full fine-tuning",
    claim="LoRA generalises full fine-tuning: as r grows to the rank of the weights, it can express any update, while adapters converge to an MLP.",
    source="Hu et al. 2021, §4.1",
    design="A Gaussian ΔW (the worst case for low rank) for each shape of linear layer in the base; `extract_from_full` gives the best B·A for six ranks up to min(d, k). "
    f"Holds if the error is at most {EXACT:g} of ‖ΔW‖ at full rank in float64 and falls with each larger rank.",
    expected="error 0 at r = min(d, k); as many parameters as ΔW at r = dk/(d+k) (288 for 576 × 576)",
    measure=measure_rank,
    draw=draw_rank,
)
FOLD = Claim(
    id="only-lora-merges",
    title="Adapters cannot be folded into W; LoRA can",
    claim="LoRA's update is linear and merges into the weights; a bottleneck adapter's nonlinearity keeps it a layer of its own.",
    source="Hu et al. 2021, §3 and §4.1",
    design=f"Hidden states half way up the base, 4·(d+1) random tokens; a LoRA term of rank {BOTTLENECK} and Houlsby's and Lin's adapters of {BOTTLENECK} with random weights (variance 1/fan-in). Least squares in "
    "float64 fits the best affine map to each one's change on half of the tokens; what it misses on the other half counts. "
    f"Holds if that is below 1e-6 for LoRA and above {CURVED:g} for both adapters, and lorasmith refuses to read those for a merge.",
    expected="LoRA 0 (rounding); adapters more",
    measure=measure_fold,
    draw=draw_fold,
)
