"""The whole experiment: both phases for every arm and seed, then numbers, pictures and a film."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from lorasmith.errors import OutputError
from lorasmith.recipes.pixels.film import Episode, redraw, save_film, watch
from lorasmith.recipes.pixels.games import make_game
from lorasmith.recipes.pixels.pictures import draw_arms, draw_reconstructions
from lorasmith.recipes.pixels.policy import load_policy
from lorasmith.recipes.pixels.proof import prove_adapter
from lorasmith.recipes.pixels.settings import Arm, Settings
from lorasmith.recipes.pixels.stages import (
    BASE,
    learn_to_play,
    learn_to_see,
    load_autoencoder,
    play_at_random,
    read_result,
)
from lorasmith.recipes.pixels.summary import last_return, summarise
from lorasmith.train import commit, write_atomically

SUMMARY, ARMS, REDRAWN, FILM = "pixels.json", "arms.png", "reconstructions.png", "policy.gif"
PACKAGES = ("lorasmith", "torch", "stable-baselines3", "gymnasium", "minatar", "ale-py", "numpy")
SHOWN_FRAMES, PROVED_FRAMES, FILM_FRAMES, FILM_SEED = 9, 512, 220, 1000

Say = Callable[[str], None]
Runs = dict[Arm, list[Path]]


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
        best, where, seed = _best_adapted(settings, runs)
        episode = _shown_episode(settings, eyes[where], runs[best][where])
        summary |= {
            "shown": {"arm": best.name, "seed": seed, "return": episode.scores[-1]},
            "redrawing_error": _draw_redrawn(settings, seed, eyes[where], episode, out / REDRAWN),
            "adapters": _prove(settings, eyes, runs),
            "device": {"machine": platform.machine(), "cpus": os.cpu_count(), "jobs": jobs},
            "commit": commit(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        draw_arms(summary, out / ARMS)
        _film(settings, eyes[where], best, episode, out / FILM)
        write_atomically(out / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def _run_phases(settings: Settings, out: Path, jobs: int, say: Say) -> tuple[list[Path], Runs]:
    arms, seeds = settings.arms(), settings.seeds
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
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
            say(f"{futures[future]}: {found}, {result['cpu_s']:.0f} s ({done}/{len(futures)}, about {left / 60:.0f} min left)")
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _best_adapted(settings: Settings, runs: Runs) -> tuple[Arm, int, int]:
    """The adapted arm with the highest mean, its best run's place, and that run's seed."""
    last = {arm: [last_return(read_result(run)) for run in found] for arm, found in runs.items() if arm.rank}
    best = max(last, key=lambda arm: statistics.fmean(last[arm]))
    where = last[best].index(max(last[best]))
    return best, where, settings.seeds[where]


def _shown_episode(settings: Settings, eyes: Path, run: Path) -> Episode:
    env = make_game(settings.game)
    policy = load_policy(run, load_file(eyes / BASE), env.observation_space, env.action_space, settings.latent)  # type: ignore[arg-type]
    return watch(policy, settings.game, seed=FILM_SEED, most_frames=FILM_FRAMES)


def _draw_redrawn(settings: Settings, seed: int, eyes: Path, episode: Episode, path: Path) -> dict[str, float]:
    """Draw frames of random play and of the policy's beside their reconstructions; returns both mean squared errors."""
    halves = load_autoencoder(eyes)
    # seeds beside those of the collection, so that these frames were not trained on
    chance, _ = play_at_random(settings, seed + 10_000, SHOWN_FRAMES * 40)
    sources = {"random play, what the autoencoder learned from": chance, "the policy's play, later": episode.frames}
    sheets, errors = {}, {}
    for (title, frames), name in zip(sources.items(), ("random_play", "policy_play"), strict=True):
        drawn = redraw(frames, *halves)
        errors[name] = (drawn.float() - frames.float()).div(255).square().mean().item()
        chosen = torch.linspace(0, len(frames) - 1, SHOWN_FRAMES).long()
        sheets[f"{title}: mean squared error {errors[name]:.2g}"] = (frames[chosen], drawn[chosen])
    draw_reconstructions(sheets, path)
    return errors


def _film(settings: Settings, eyes: Path, arm: Arm, episode: Episode, path: Path) -> None:
    drawn = redraw(episode.frames, *load_autoencoder(eyes))
    save_film(episode, drawn, path, title=f"{settings.game}, {arm.label}")


def _prove(settings: Settings, eyes: list[Path], runs: Runs) -> list[dict[str, Any]]:
    env = make_game(settings.game)
    frames, _ = play_at_random(settings, settings.seeds[0] + 20_000, PROVED_FRAMES)
    both = (env.observation_space, env.action_space)
    return [
        prove_adapter(run, load_file(base / BASE), frames, both, settings.latent)  # type: ignore[arg-type]
        for arm, found in runs.items() if arm.rank
        for base, run in zip(eyes, found, strict=True)
    ]  # fmt: skip


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise OutputError(f"another run is writing into {out}; wait for it, or choose another folder.") from None
    except FileExistsError:
        raise OutputError(f"{out} is a file; choose a folder.") from None
