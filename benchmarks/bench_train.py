"""Training: a step beside PEFT's, an epoch beside TRL and PEFT, memory, and the share of the machine's peak.

    lorasmith bench train [--peers] [--quick]

Dense: 8 x 256 random tokens, all supervised, rank 16 on all linear layers of the built-in base. Every variant is
a process of its own (memory, allocator settings and threads are its own); steps are interleaved, one of each
per round, and rows hold medians over the rounds after the first.
Epochs: 468 E2E examples and 200 chat examples, in turn. `LORASMITH_BENCH_DATA` names a folder with
`e2e_nlg/devset.csv` and `gsm8k/train.jsonl`; without it the sample that ships is used and no chat set.
TRL is installed into a scratch environment if it is missing (`LORASMITH_BENCH_TRL` names its python).
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lorasmith.bases import base_directory, home

HERE = Path(__file__).parent
ABOUT: dict[str, Any] = {"base": "smollm2-135m", "rank": 16, "dense": "8 x 256 tokens, all supervised"}
STEP_FLOPS = {"lora": 4, "full": 6}
LINEAR_PARAMS, HEAD_PARAMS, LAYERS, HEADS, HEAD_DIM = 106_168_320, 28_311_552, 30, 9, 64
TOKENS, SLOTS = 2048, 256


def run(peers: bool = False, quick: bool = False) -> list[dict[str, Any]]:
    rounds = 3 if quick else 7
    rows = [row for dtype in ("bf16", "fp32") for row in dense(dtype, rounds, peers=peers)]
    if peers:
        rows += epochs(quick=quick)
    return rows


def dense(dtype: str, rounds: int, *, peers: bool) -> list[dict[str, Any]]:
    names = ["ours", "lean-memory", "full"] if dtype == "bf16" else ["ours"]
    names += ["peft"] if peers else []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(name, dtype)) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        peaks: list[float] = []
        for _ in range(rounds + 1):
            for name, ask in workers.items():
                times[name].append(ask("step"))
            peaks.append(workers["ours"]("gemm"))
        memory = {name: ask("peak") for name, ask in workers.items()}
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    spread = {name: [round(min(v[1:]), 3), round(max(v[1:]), 3)] for name, v in times.items()}
    gemm = statistics.median(peaks[1:])
    share = step_flops() / seconds["ours"] / gemm / 1e9
    rows = [row(f"{dtype} step, share of the multiply peak ({gemm:.0f} GFLOP/s)", share, None, spread=spread)]
    if "full" in seconds:
        rows.append(row(f"{dtype} step / our full fine-tuning step", seconds["ours"], seconds["full"]))
    if peers:
        rows.append(row(f"{dtype} step / PEFT, s", seconds["ours"], seconds["peft"]))
        for name in ("ours", "lean-memory"):
            if name in memory:
                what = f"{dtype} peak memory{', recompute mlp' if name != 'ours' else ''} / PEFT, MB"
                rows.append(row(what, memory[name] / 1e6, memory["peft"] / 1e6))
        if "lean-memory" in seconds:
            rows.append(
                row(f"{dtype} step, recompute mlp / PEFT, s", seconds["lean-memory"], seconds["peft"])
            )
    return rows


def step_flops() -> float:
    """Forward and input gradients of the frozen weights, and attention's products below the diagonal."""
    attention = LAYERS * (TOKENS // SLOTS) * HEADS * SLOTS * SLOTS * HEAD_DIM * 2 / 2
    return TOKENS * 4 * (LINEAR_PARAMS + HEAD_PARAMS) + attention * (2 + 4)


@contextmanager
def worker(variant: str, dtype: str) -> Iterator[Any]:
    command = [sys.executable, "-m", "train.worker", variant, dtype]
    process = subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout

    def ask(what: str) -> float:
        print(what, file=process.stdin, flush=True)
        return float(process.stdout.readline())  # type: ignore[union-attr]

    try:
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the {variant} worker did not start; its message is above")
        yield ask
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def epochs(*, quick: bool) -> list[dict[str, Any]]:
    python = trl_python()
    base = str(base_directory("smollm2-135m"))
    rows, curves = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, examples in data_sets().items():
            data = Path(folder) / f"{name}.jsonl"
            examples = examples[:64] if quick else examples
            data.write_text("".join(json.dumps(example) + "\n" for example in examples))
            ours = json_of([sys.executable, "-m", "train.epoch", str(data)])
            peer = json_of([str(python), "train/trl_epoch.py", base, str(data)])
            ABOUT["trl_versions"] = peer["versions"]
            curves[name] = {"ours": ours["losses"], "trl": peer["losses"]}
            rows.append(
                row(
                    f"epoch, {name} ({len(examples)} examples): TRL + PEFT / ours, s",
                    ours["train_s"],
                    peer["train_s"],
                    ratio=peer["train_s"] / ours["train_s"],
                    tokens_per_s=ours["tokens"] / ours["train_s"],
                    final_losses=[mean_of_last(ours["losses"]), mean_of_last(peer["losses"])],
                )
            )
            memory = (ours["peak_rss_bytes"] / 1e6, peer["peak_rss_bytes"] / 1e6)
            rows.append(row(f"epoch, {name}: peak memory, MB", *memory))
    if not quick:
        plot(curves, HERE / "records" / "train_losses.png")
    return rows


def data_sets() -> dict[str, list[dict[str, Any]]]:
    source = os.environ.get("LORASMITH_BENCH_DATA")
    if source is None:
        sample = HERE.parent / "src/lorasmith/samples/e2e/train.jsonl"
        return {"the shipped E2E sample": [json.loads(x) for x in sample.read_text().splitlines()][:468]}
    with (Path(source) / "e2e_nlg/devset.csv").open(encoding="utf-8") as file:
        pairs = [
            {"prompt": f"Describe the restaurant: {r['mr']}", "completion": r["ref"]}
            for r in csv.DictReader(file)
        ]
    chat = (Path(source) / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    return {
        "E2E every 10th row": pairs[::10][:468],
        "E2E natural order": pairs[:468],
        "chat, system prompt shared": [
            {
                "messages": [
                    {"role": "user", "content": x["question"]},
                    {"role": "assistant", "content": x["answer"]},
                ]
            }
            for x in map(json.loads, chat)
        ],
    }


def trl_python() -> Path:
    """The interpreter of an environment with TRL, made if it is not there."""
    if given := os.environ.get("LORASMITH_BENCH_TRL"):
        return Path(given)
    folder = home() / "bench" / "trl"
    python = folder / "bin" / "python"
    if not (folder / ".installed").is_file():
        venv.create(folder, with_pip=True)
        pins = HERE.parent / "constraints.txt"
        install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(pins), "torch", "trl", "peft"]
        subprocess.run(install, check=True)
        (folder / ".installed").touch()
    return python


def json_of(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def row(
    what: str, ours: float, peer: float | None, *, ratio: float | None = None, **more: Any
) -> dict[str, Any]:
    ratio = ratio if ratio is not None or peer is None else ours / peer
    return {"what": what, "ours": ours, "peer": peer, "ratio": ratio, **more}


def mean_of_last(losses: list[float], share: float = 0.25) -> float:
    last = losses[-max(1, round(len(losses) * share)) :]
    return sum(last) / len(last)


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Loss by step, ours over theirs, smoothed over five steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2), squeeze=False)
    for axis, (name, by_tool) in zip(axes[0], curves.items(), strict=True):
        for tool, colour in (("trl", "#999999"), ("ours", "#0b6e4f")):
            losses = by_tool[tool]
            smooth = [statistics.fmean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
            axis.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.2, linewidth=0.8)
            axis.plot(range(1, len(losses) + 1), smooth, color=colour, linewidth=1.6, label=tool)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("training loss, nats per token")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
