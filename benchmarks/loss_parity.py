"""The same epoch by the fast path and by the plain one, three seeds each: is the difference within the seeds' noise?

    python benchmarks/loss_parity.py

Fast: everything that `train` chooses by itself. Plain: `kernels="plain"`, `packing="none"`. The same seed gives
both the same factors and the same order of examples. Appends to `records/loss_parity.jsonl`, draws
`records/loss_parity.png`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import record

import lorasmith as ls

SAMPLE = Path(ls.__file__).parent / "samples/e2e"
EXAMPLES, SEEDS = 468, (0, 1, 2)
WAYS: dict[str, dict[str, Any]] = {"fast": {}, "plain": {"kernels": "plain", "packing": "none"}}
COLOURS = {"fast": "#0b6e4f", "plain": "#999999"}

Curve = dict[str, list[float]]


def main() -> None:
    base = ls.load_base("smollm2-135m")
    rows = [json.loads(line) for line in (SAMPLE / "train.jsonl").read_text().splitlines()]
    data = rows[:: len(rows) // EXAMPLES][:EXAMPLES]
    curves = {way: [epoch(base, data, seed, options) for seed in SEEDS] for way, options in WAYS.items()}
    finals = {way: [curve["eval"][-1] for curve in of_way] for way, of_way in curves.items()}
    pairs = [fast - plain for fast, plain in zip(finals["fast"], finals["plain"], strict=True)]
    seeds = statistics.stdev(finals["plain"])
    found = [
        {"what": "evaluation loss after an epoch", "ours": statistics.fmean(finals["fast"]), "peer": statistics.fmean(finals["plain"]), "ratio": None, **finals},
        {"what": "largest difference at the same seed / standard deviation over seeds", "ours": max(map(abs, pairs)), "peer": seeds, "ratio": max(map(abs, pairs)) / seeds},
    ]  # fmt: skip
    plot(curves, record.RECORDS / "loss_parity.png")
    print(json.dumps(found, indent=1))
    record.append("loss_parity", found, {"base": "smollm2-135m", "examples": EXAMPLES, "seeds": SEEDS})


def epoch(base: Any, data: list[dict[str, Any]], seed: int, options: dict[str, Any]) -> Curve:
    settings = ls.TrainConfig(lr=1e-3, seed=seed, save_every=10**6, **options)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        held_out = SAMPLE / "validation.jsonl"
        ls.train(
            base, data, ls.LoRAConfig(rank=16, alpha=32), settings, out=out, eval_data=held_out, quiet=True
        )
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": [row["loss"] for row in rows if "loss" in row],
        "eval": [row["eval_loss"] for row in rows if "eval_loss" in row],
        "at": [row["step"] for row in rows if "eval_loss" in row],
    }


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for way, of_way in curves.items():
        for k, curve in enumerate(of_way):
            label = f"{way}, {len(SEEDS)} seeds" if k == 0 else None
            style = {"color": COLOURS[way], "linewidth": 1.6, "alpha": 0.8}
            right.plot(curve["at"], curve["eval"], label=label, **style)
            loss = curve["loss"]
            smooth = [statistics.fmean(loss[max(0, i - 4) : i + 1]) for i in range(len(loss))]
            left.plot(range(1, len(loss) + 1), smooth, label=label, **style)
    for axis, what in ((left, "training loss, mean of five steps"), (right, "evaluation loss")):
        axis.set(xlabel="optimizer step", title=what)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("nats per token")
    left.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
