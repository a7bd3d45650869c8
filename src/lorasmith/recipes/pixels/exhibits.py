"""What is shown beside the numbers: reconstructions, a film of the best adapted policy, proofs of its adapter."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stable_baselines3.common.policies import ActorCriticPolicy

from lorasmith.recipes.pixels.film import Episode, redraw, save_film, watch
from lorasmith.recipes.pixels.games import make_game
from lorasmith.recipes.pixels.pictures import draw_reconstructions
from lorasmith.recipes.pixels.policy import load_policy
from lorasmith.recipes.pixels.proof import prove_adapter
from lorasmith.recipes.pixels.settings import Arm, Settings
from lorasmith.recipes.pixels.stages import BASE, load_autoencoder, play_at_random, read_result
from lorasmith.recipes.pixels.summary import last_return

REDRAWN, FILM = "reconstructions.png", "policy.gif"
SHOWN_FRAMES, PROVED_FRAMES, FILM_FRAMES = 9, 512, 220
FILM_SEEDS = range(1000, 1009)

Runs = dict[Arm, list[Path]]


def show(settings: Settings, eyes: list[Path], runs: Runs, out: Path) -> dict[str, Any]:
    """Draw `reconstructions.png` and `policy.gif`, and prove every adapter; returns what was measured.

    Args:
        eyes: folders of phase one, seed by seed.
        runs: folders of phase two, for each arm seed by seed.
    """
    arm, where, seed = _best_adapted(settings, runs)
    policy = load_policy(
        runs[arm][where], load_file(eyes[where] / BASE), make_game(settings.game), settings.latent
    )
    episode = _middling_episode(policy, settings.game)
    drawn = redraw(episode.frames, *load_autoencoder(eyes[where]))
    save_film(episode, drawn, out / FILM, title=f"{settings.game}, {arm.label}")
    return {
        "shown": {"arm": arm.name, "seed": seed, "return": episode.scores[-1]},
        "redrawing_error": _draw_redrawn(settings, seed, eyes[where], episode, out / REDRAWN),
        "adapters": _prove(settings, eyes, runs),
    }


def _best_adapted(settings: Settings, runs: Runs) -> tuple[Arm, int, int]:
    """The adapted arm with the highest mean, its best run's place, and that run's seed."""
    last = {arm: [last_return(read_result(run)) for run in found] for arm, found in runs.items() if arm.rank}
    best = max(last, key=lambda arm: statistics.fmean(last[arm]))
    where = last[best].index(max(last[best]))
    return best, where, settings.seeds[where]


def _middling_episode(policy: ActorCriticPolicy, game: str) -> Episode:
    """Of nine episodes the one with the median return: neither luck nor bad luck is shown."""
    episodes = [watch(policy, game, seed=seed, most_frames=FILM_FRAMES) for seed in FILM_SEEDS]
    return sorted(episodes, key=lambda episode: episode.scores[-1])[len(episodes) // 2]


def _draw_redrawn(
    settings: Settings, seed: int, eyes: Path, episode: Episode, path: Path
) -> dict[str, float]:
    """Draw frames of random play and of the policy's beside their reconstructions; returns both mean squared errors."""
    halves = load_autoencoder(eyes)
    # seeds beside those of the collection, so that these frames were not trained on
    chance, _ = play_at_random(settings, seed + 10_000, SHOWN_FRAMES * 40)
    sources = {
        "random play, what the autoencoder learned from": chance,
        "the policy's play, later": episode.frames,
    }
    sheets, errors = {}, {}
    for (title, frames), name in zip(sources.items(), ("random_play", "policy_play"), strict=True):
        drawn = redraw(frames, *halves)
        errors[name] = (drawn.float() - frames.float()).div(255).square().mean().item()
        chosen = torch.linspace(0, len(frames) - 1, SHOWN_FRAMES).long()
        sheets[f"{title}: mean squared error {errors[name]:.2g}"] = (frames[chosen], drawn[chosen])
    draw_reconstructions(sheets, path)
    return errors


def _prove(settings: Settings, eyes: list[Path], runs: Runs) -> list[dict[str, Any]]:
    game = make_game(settings.game)
    frames, _ = play_at_random(settings, settings.seeds[0] + 20_000, PROVED_FRAMES)
    return [
        prove_adapter(run, load_file(base / BASE), game, frames, settings.latent)
        for arm, found in runs.items() if arm.rank
        for base, run in zip(eyes, found, strict=True)
    ]  # fmt: skip
