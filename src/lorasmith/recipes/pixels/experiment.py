"""The whole experiment: both phases for every arm and seed, then numbers, pictures and a film."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorasmith.errors import OutputError, TrainingError
from lorasmith.recipes.pixels.exhibits import Runs, show
from lorasmith.recipes.pixels.games import make_game
from lorasmith.recipes.pixels.pictures import draw_arms
from lorasmith.recipes.pixels.settings import Settings
from lorasmith.recipes.pixels.stages import learn_to_play, learn_to_see, read_result
from lorasmith.recipes.pixels.summary import last_return, summarise
from lorasmith.train import commit, write_atomically

SUMMARY, ARMS = "pixels.json", "arms.png"
PACKAGES = ("lorasmith", "torch", "stable-baselines3", "gymnasium", "minatar", "ale-py", "numpy")

Say = Callable[[str], None]


def run_experiment(settings: Settings, out: Path, *, jobs: int, say: Say) -> dict[str, Any]:
    """Run what is not yet in `out`, and write `pixels.json`, `arms.png`, `reconstructions.png`, `policy.gif`.

    Args:
        jobs: processes side by side; the numbers do not depend on it.
        say: gets a line for each piece of work that ends.

    Raises:
        ConfigError: the game is unknown or shows no pixels.
        OutputError: another run is writing into `out`.
    """
    make_game(settings.game).close()
    with _alone(out):
        eyes, runs = _run_phases(settings, out, jobs, say)
        results = {arm: [read_result(run) for run in found] for arm, found in runs.items()}
        summary = summarise(settings, [read_result(e) for e in eyes], results)
        summary |= {
            **show(settings, eyes, runs, out),
            "device": {"machine": platform.machine(), "cpus": os.cpu_count(), "jobs": jobs},
            "commit": commit(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        draw_arms(summary, out / ARMS)
        write_atomically(out / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def _run_phases(settings: Settings, out: Path, jobs: int, say: Say) -> tuple[list[Path], Runs]:
    arms, seeds = settings.arms(), settings.seeds
    with _said_plainly(), ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        seeing = {pool.submit(learn_to_see, settings, s, out): f"autoencoder, seed {s}" for s in seeds}
        _report(seeing, say)
        playing = {pool.submit(learn_to_play, settings, a, s, out): (a, s) for s in seeds for a in arms}
        _report({future: f"{a.name}, seed {s}" for future, (a, s) in playing.items()}, say)
    runs: Runs = {arm: [] for arm in arms}
    for future, (arm, _) in playing.items():
        runs[arm].append(future.result())
    return [future.result() for future in seeing], runs


def _report(futures: dict[Future[Path], str], say: Say) -> None:
    started = time.monotonic()
    try:
        for done, future in enumerate(as_completed(futures), 1):
            result = read_result(future.result())
            found = f"loss {result['loss']:.2g}" if "loss" in result else f"return {last_return(result):.2f}"
            left = (time.monotonic() - started) / done * (len(futures) - done)
            say(
                f"{futures[future]}: {found}, {result['cpu_s']:.0f} s ({done}/{len(futures)}, about {left / 60:.0f} min left)"
            )
    except BaseException:
        for future in futures:
            future.cancel()
        raise


@contextmanager
def _said_plainly() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise TrainingError(
            "a process of the experiment was killed, mostly for want of memory. What is whole is kept: "
            "run the same command again, with --jobs 1 or fewer --frames."
        ) from None


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise OutputError(
            f"another run is writing into {out}; wait for it, or choose another folder."
        ) from None
    except FileExistsError:
        raise OutputError(f"{out} is a file; choose a folder.") from None
