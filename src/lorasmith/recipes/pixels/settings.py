"""What decides the outcome of a run, and the arms that are compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorasmith.errors import ConfigError

Way = Literal["frozen", "lora", "full", "scratch"]
RECIPE_VERSION = 1  # raised whenever the same settings would give other numbers


@dataclass(frozen=True)
class Settings:
    """Of the whole experiment; the defaults are the small setting of `docs/pixels.md`.

    Args:
        frames: how many the autoencoder learns from, collected by random play.
        updates: of the autoencoder.
        latent: numbers that describe a frame.
        steps: of the game, for PPO in each arm.
        games: played side by side.
        rollout: steps of each game between two PPO updates.
        alpha: the same for every rank, so that one learning rate suits them all.
    """

    game: str = "MinAtar/Breakout-v1"
    seeds: tuple[int, ...] = (0, 1, 2)
    ranks: tuple[int, ...] = (1, 4, 16)
    frames: int = 20_000
    updates: int = 3_000
    latent: int = 32
    steps: int = 300_000
    games: int = 8
    rollout: int = 128
    batch: int = 256
    epochs: int = 4
    learning_rate: float = 1e-3
    entropy: float = 0.01
    discount: float = 0.99
    alpha: float = 32.0

    def __post_init__(self) -> None:
        faults = [
            f"{name}={value}: use a number above 0"
            for name, value in asdict(self).items()
            if name != "entropy" and isinstance(value, int | float) and value <= 0
        ]
        for name, least in (("seeds", 0), ("ranks", 1)):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or min(values) < least or len(set(values)) < len(values):
                faults.append(f"{name}={list(values)}: use different whole numbers from {least}")
        if self.steps < self.games * self.rollout:
            faults.append(f"steps={self.steps}: one rollout alone has {self.games * self.rollout}")
        if not (self.entropy >= 0 and self.discount <= 1):
            faults.append(f"entropy={self.entropy}, discount={self.discount}: use at least 0, and at most 1")
        if faults:
            raise ConfigError("pixels cannot run:\n  " + "\n  ".join(faults))

    def arms(self) -> list[Arm]:
        """Every way to treat the encoder, in the order of the figure."""
        adapted = [Arm("lora", rank) for rank in self.ranks]
        return [Arm("frozen"), *adapted, Arm("full"), Arm("scratch")]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Arm:
    """One way to treat the encoder while PPO learns."""

    way: Way
    rank: int | None = None

    @property
    def name(self) -> str:
        """`lora-4`, `full`."""
        return self.way if self.rank is None else f"{self.way}-{self.rank}"

    @property
    def label(self) -> str:
        """For the figure."""
        words = {"frozen": "encoder frozen", "full": "fully fine-tuned", "scratch": "from scratch"}
        return words.get(self.way, f"LoRA, r = {self.rank}")


def encoder_key(settings: Settings, seed: int) -> str:
    """Names the autoencoder that these settings make."""
    return f"seed{seed}-{_digest(settings, ('game', 'frames', 'updates', 'latent', 'games'), seed)}"


def arm_key(settings: Settings, arm: Arm, seed: int) -> str:
    """Names one run of PPO; it changes with whatever would change the run, and with nothing else."""
    names = [name for name in asdict(settings) if name not in ("seeds", "ranks", "alpha")]
    own = [arm.name, settings.alpha if arm.way == "lora" else None]
    return f"{arm.name}-seed{seed}-{_digest(settings, names, [seed, *own])}"


def _digest(settings: Settings, names: Any, more: Any) -> str:
    values = [RECIPE_VERSION, [getattr(settings, name) for name in names], more]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:10]
