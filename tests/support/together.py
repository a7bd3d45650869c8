"""Runs for the processes that torchrun starts: `python -m tests.support.together JOBS.json`, and starting them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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
    import torch

    from lorasmith.lora import LoRAConfig
    from lorasmith.train import TrainConfig, train
    from tests.unit.test_train import base

    def on_step(step: int) -> None:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ.get("RANK") == "1":
            for key, number in (("killed_at", signal.SIGKILL), ("stopped_at", signal.SIGTERM)):
                if step == job.get(key):
                    os.kill(os.getpid(), number)

    family, options = job.get("family", "llama"), job.get("model", {})
    given = base(getattr(torch, job.get("dtype", "float64")), family, **options)
    lora = LoRAConfig.from_dict({"rank": 2, "alpha": 8} | job.get("lora", {}))
    settings = {"lr": 0.02, "batch_size": 5, "epochs": 3, "save_every": 2, "eval_every": 3, "seed": 3}
    return train(
        given, RECORDS, lora, TrainConfig.from_dict(settings | job.get("train", {})), out=job["out"],
        eval_data=HELD_OUT, resume=job.get("resume", False), on_step=on_step,
    )  # fmt: skip


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
    with world():
        for job in json.loads(Path(sys.argv[1]).read_text()):
            train_job(job)


if __name__ == "__main__":
    main()
