"""Runs for the processes that torchrun starts: `python -m tests.support.together JOBS.json`, and starting them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDS = [
    {"prompt": f"{c}{c} is" + " very" * (i % 5), "completion": f" {c.upper()}{i}."}
    for i, c in enumerate("abcdefghijk")
]
HELD_OUT = [{"prompt": f"{c}{c} is", "completion": f" {c.upper()}?"} for c in "abcde" * 7]


def train_job(job: dict[str, Any]) -> Any:
    """One run of `train`, alone or in the world that there is; at `killed_at` or `stopped_at` rank 1 gets a signal."""
    from lorasmith.lora import LoRAConfig
    from lorasmith.train import TrainConfig, train

    settings = {"lr": 0.02, "batch_size": 5, "epochs": 3, "save_every": 2, "eval_every": 3, "seed": 3}
    return train(
        base_of(job), RECORDS, LoRAConfig.from_dict({"rank": 2, "alpha": 8} | job.get("lora", {})),
        TrainConfig.from_dict(settings | job.get("train", {})), out=job["out"],
        eval_data=HELD_OUT, resume=job.get("resume", False), on_step=signals(job),
    )  # fmt: skip


def sweep_job(job: dict[str, Any]) -> Any:
    """The sweep over `grid`, halved; signals as in `train_job`, after a round."""
    from lorasmith.sweep import Halving, parse_grid, points, sweep

    made = points(parse_grid(job["grid"]), {}, {"batch_size": 5, "epochs": 3, "save_every": 2})
    return sweep(
        base_of(job),
        RECORDS,
        made,
        out=job["out"],
        eval_data=HELD_OUT,
        halving=Halving(),
        on_round=signals(job),
    )


def base_of(job: dict[str, Any]) -> Any:
    import torch

    from tests.unit.test_train import base

    return (
        job["base"]
        if "base" in job
        else base(getattr(torch, job.get("dtype", "float64")), job.get("family", "llama"))
    )


def signals(job: dict[str, Any]) -> Any:
    """What is called with each step's number, and sends this process, if it is rank 1 at its first start, a signal."""

    def on_step(step: int) -> None:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ.get("RANK") == "1":
            for key, number in (("killed_at", signal.SIGKILL), ("stopped_at", signal.SIGTERM)):
                if step == job.get(key):
                    os.kill(os.getpid(), number)

    return on_step


def launch(count: int, *arguments: object, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`torchrun` with that many processes on this machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        *options,
    ]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return subprocess.run(
        [*command, "-m", *map(str, arguments)], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, text=True,
        capture_output=True, timeout=240, check=False,
    )  # fmt: skip


def launch_jobs(folder: Path, count: int, jobs: list[dict[str, Any]], *options: str) -> str:
    """Run the jobs one after another in one launch; returns what was said."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = launch(count, "tests.support.together", file, options=options)
    assert done.returncode == 0, done.stderr
    return done.stderr


def main() -> None:
    from lorasmith.train import loop, world

    loop.plot_loss = lambda *_: None  # half of the time of so small a run
    jobs = json.loads(Path(sys.argv[1]).read_text())
    # where no frame of ours holds the base, `train` is to end the process group itself
    with nullcontext() if "base" in jobs[0] else world():
        for job in jobs:
            (sweep_job if "grid" in job else train_job)(job)
    left = [name for name in thread_names() if "gloo" in name]
    assert not left, f"{left} still run, and can abort the interpreter as it ends"


def thread_names() -> list[str]:
    """Of this process, those of C++ too."""
    return [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    main()
