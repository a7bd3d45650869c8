"""The two phases of one seed, each kept in a folder named by what decided it, so that a rerun goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch import Tensor

from lorasmith.bases import fingerprint_directory
from lorasmith.errors import TrainingError
from lorasmith.recipes.pixels.autoencoder import Decoder, Encoder, train_autoencoder
from lorasmith.recipes.pixels.games import seeded_games
from lorasmith.recipes.pixels.policy import (
    encoder_of,
    policy_options,
    prepare_encoder,
    renew_optimizer,
    same_bits,
    save_policy,
)
from lorasmith.recipes.pixels.settings import Arm, Settings, arm_key, encoder_key

BASE, DECODER, RESULT = "model.safetensors", "decoder.safetensors", "result.json"


def learn_to_see(settings: Settings, seed: int, out: Path) -> Path:
    """Phase one: collect frames by random play and train the autoencoder; returns its folder.

    The encoder lies there as a base that `lorasmith check --base` reads: `config.json` and safetensors.

    Raises:
        TrainingError: no episode ended, so there is no return of random play to compare with.
    """
    directory = out / "encoders" / encoder_key(settings, seed)
    if directory.exists():
        return directory
    with _one_thread(), _whole_or_not_at_all(directory) as part:
        started = time.process_time()
        frames, returns = play_at_random(settings, seed, settings.frames)
        _require_episodes(returns, "frames", settings.frames)
        encoder, decoder, losses = train_autoencoder(
            frames, latent=settings.latent, updates=settings.updates, batch=256, learning_rate=1e-3, seed=seed
        )
        save_file(encoder.state_dict(), part / BASE)
        save_file(decoder.state_dict(), part / DECODER)
        _write(part / "config.json", {"model_type": "lorasmith-pixels-encoder", **encoder.shape})
        variance = frames.float().div(255).var(0, correction=0).mean().item()
        result = {
            "seed": seed, "loss": float(np.mean(losses[-50:])), "pixel_variance": variance,
            "random_returns": returns, "cpu_s": time.process_time() - started,
        }  # fmt: skip
        _write(part / RESULT, result)
    return directory


def learn_to_play(settings: Settings, arm: Arm, seed: int, out: Path) -> Path:
    """Phase two: PPO, with the encoder treated as `arm` says; returns the folder of the policy.

    Raises:
        TrainingError: a weight that was to stay frozen has moved, or no episode ended.
    """
    directory = out / "arms" / arm_key(settings, arm, seed)
    if directory.exists():
        return directory
    eyes = learn_to_see(settings, seed, out)
    base = load_file(eyes / BASE)
    with _one_thread(), _whole_or_not_at_all(directory) as part:
        started = time.process_time()
        ppo = new_ppo(settings, arm, base, seed)
        record = Returns()
        ppo.learn(settings.steps, callback=record)
        _require_episodes(record.returns, "steps", settings.steps)
        if arm.way in ("frozen", "lora"):
            _check_frozen(ppo.policy, base, arm)
        provenance = {
            "base": {"name": eyes.name, "fingerprint": fingerprint_directory(eyes).to_dict()},
            "run": {"arm": arm.name, "seed": seed, **settings.to_dict()},
        }
        save_policy(ppo.policy, arm, part, provenance)
        trained = sum(p.numel() for p in encoder_of(ppo.policy).parameters() if p.requires_grad)
        result = {
            "arm": arm.name, "seed": seed, "encoder_params_trained": trained, "returns": record.returns,
            "at_step": record.at_step, "cpu_s": time.process_time() - started,
        }  # fmt: skip
        _write(part / RESULT, result)
    return directory


def new_ppo(settings: Settings, arm: Arm, base: dict[str, Tensor], seed: int) -> PPO:
    """stable-baselines3's PPO, about to begin; the learning rate falls linearly to zero."""
    games = VecMonitor(DummyVecEnv(seeded_games(settings.game, settings.games, seed)))
    ppo = PPO(
        ActorCriticPolicy, games, n_steps=settings.rollout, batch_size=settings.batch, n_epochs=settings.epochs,
        learning_rate=lambda left: settings.learning_rate * left, ent_coef=settings.entropy,
        gamma=settings.discount, seed=seed, device="cpu", policy_kwargs=policy_options(settings.latent),
    )  # fmt: skip
    prepare_encoder(encoder_of(ppo.policy), arm, base, alpha=settings.alpha, seed=seed)
    renew_optimizer(ppo.policy)
    return ppo


def play_at_random(settings: Settings, seed: int, frames: int) -> tuple[Tensor, list[float]]:
    """The frames of random play, uint8 (count, channels, side, side), and the return of each whole episode."""
    games = VecMonitor(DummyVecEnv(seeded_games(settings.game, settings.games, seed)))
    seen, returns = [np.array(games.reset())], list[float]()
    chance = np.random.default_rng(seed)
    while len(seen) * settings.games < frames:
        actions = chance.integers(games.action_space.n, size=settings.games)  # type: ignore[attr-defined]
        observations, _, _, infos = games.step(actions)
        seen.append(np.array(observations))
        returns += _ended(infos)
    return torch.from_numpy(np.concatenate(seen)[:frames]), returns


def load_autoencoder(directory: Path) -> tuple[Encoder, Decoder]:
    """Read both halves back."""
    shape = json.loads((directory / "config.json").read_text())
    encoder = Encoder(shape["channels"], shape["side"], shape["latent"])
    decoder = Decoder(encoder)
    encoder.load_state_dict(load_file(directory / BASE))
    decoder.load_state_dict(load_file(directory / DECODER))
    return encoder, decoder


def read_result(directory: Path) -> dict[str, Any]:
    """What a phase measured."""
    result: dict[str, Any] = json.loads((directory / RESULT).read_text())
    return result


class Returns(BaseCallback):
    """Notes the return of every episode, and the step at which it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[float] = []
        self.at_step: list[int] = []

    def _on_step(self) -> bool:
        ended = _ended(self.locals["infos"])
        self.returns += ended
        self.at_step += [self.num_timesteps] * len(ended)
        return True


def _ended(infos: Any) -> list[float]:
    return [float(info["episode"]["r"]) for info in infos if "episode" in info]


def _require_episodes(returns: list[float], name: str, value: int) -> None:
    if not returns:
        raise TrainingError(
            f"no episode ended within {name}={value}, so there is no return to report; raise it."
        )


def _check_frozen(policy: ActorCriticPolicy, base: dict[str, Tensor], arm: Arm) -> None:
    if not same_bits(encoder_of(policy).state_dict(), base, base):
        raise TrainingError(
            f"{arm.name}: the encoder's base changed while PPO ran, and it was to stay frozen."
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The networks are tiny: threads would only wait for each other, and change the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _whole_or_not_at_all(directory: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only when everything is in it."""
    part = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
