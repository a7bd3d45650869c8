"""Games as pixels: every environment gives uint8 frames, (channels, height, width)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image

from lorasmith.errors import ConfigError, did_you_mean

Frame = NDArray[np.uint8]
MINATAR = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
ATARI_SIDE, ATARI_STACK = 84, 4

# one colour for each object channel of MinAtar; black is the background
PALETTE = np.array(
    [
        (0, 0, 0), (86, 180, 233), (255, 255, 255), (130, 130, 140), (213, 94, 0), (240, 228, 66),
        (0, 158, 115), (204, 121, 167), (0, 114, 178), (230, 159, 0), (160, 90, 220),
    ],
    dtype=np.uint8,
)  # fmt: skip


class Painted(gymnasium.ObservationWrapper[Frame, Any, Any]):
    """MinAtar's object channels (10, 10, n) become the picture (3, 10, 10) that a player would see.

    Where objects overlap, the last channel is on top, as in MinAtar's own display.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        shape = env.observation_space.shape
        assert shape is not None
        self.numbers = np.arange(1, shape[2] + 1)
        self.observation_space = spaces.Box(0, 255, (3, *shape[:2]), np.uint8)

    def observation(self, observation: Any) -> Frame:
        """Paint one state."""
        return np.ascontiguousarray(PALETTE[(observation * self.numbers).max(2)].transpose(2, 0, 1))


class Shrunk(gymnasium.ObservationWrapper[Frame, Any, Any]):
    """Grey Atari screens (210, 160) become (84, 84), the size that deep Q-learning made usual."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, (ATARI_SIDE, ATARI_SIDE), np.uint8)

    def observation(self, observation: Any) -> Frame:
        """Shrink one screen; each new pixel is the mean of those it covers."""
        return np.asarray(Image.fromarray(observation).resize((ATARI_SIDE, ATARI_SIDE), Image.Resampling.BOX))


def make_game(name: str) -> gymnasium.Env[Frame, Any]:
    """Open a game by its Gymnasium name: `MinAtar/Breakout-v1`, `ALE/Pong-v5`, or one that gives pixels itself.

    Raises:
        ConfigError: there is no such game, or its observations are no pixels.
    """
    if name.startswith("MinAtar/"):
        import minatar.gym

        if not any(known.startswith("MinAtar/") for known in gymnasium.registry):
            minatar.gym.register_envs()
        return Painted(_open(name))
    if name.startswith("ALE/"):
        import ale_py

        gymnasium.register_envs(ale_py)
        screen = Shrunk(_open(name, obs_type="grayscale"))
        return gymnasium.wrappers.FrameStackObservation(screen, ATARI_STACK)
    env = _open(name)
    space = env.observation_space
    if not (isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3):
        raise ConfigError(
            f'The game "{name}" shows {space}, and this recipe learns from pixels: '
            "uint8 of shape (channels, height, width)."
        )
    return env


def _open(name: str, **options: Any) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(name, **options)
    except gymnasium.error.Error as error:
        hint = did_you_mean(name, gymnasium.registry)
        raise ConfigError(f'There is no game "{name}": {error}.{hint}') from None


def seeded_games(name: str, count: int, seed: int) -> list[Callable[[], gymnasium.Env[Frame, Any]]]:
    """What makes `count` games; game k starts from seed + k."""

    def maker(k: int) -> Callable[[], gymnasium.Env[Frame, Any]]:
        def make() -> gymnasium.Env[Frame, Any]:
            game = make_game(name)
            game.reset(seed=seed + k)
            game.action_space.seed(seed + k)
            return game

        return make

    return [maker(k) for k in range(count)]
