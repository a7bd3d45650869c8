"""Catch, the smallest game that is worth seeing: a ball falls nine rows, a paddle moves under it or not."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium import spaces

SIDE = 10


class Catch(gymnasium.Env):
    """Frames (3, 10, 10): the ball is red, the paddle blue. Return 1 for a catch, else 0."""

    observation_space = spaces.Box(0, 255, (3, SIDE, SIDE), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.ball, self.paddle = 0, int(self.np_random.integers(SIDE)), SIDE // 2
        return self._frame(), {}

    def step(self, action):
        self.paddle = min(max(self.paddle + int(action) - 1, 0), SIDE - 1)
        self.row += 1
        is_over = self.row == SIDE - 1
        return self._frame(), float(is_over and self.ball == self.paddle), is_over, False, {}

    def _frame(self):
        frame = np.zeros((3, SIDE, SIDE), np.uint8)
        frame[0, self.row, self.ball] = 255
        frame[2, SIDE - 1, self.paddle] = 255
        return frame


# so that `gymnasium.make("tests.support.catch:Catch-v0")` finds it, in other processes too
if "Catch-v0" not in gymnasium.registry:
    gymnasium.register("Catch-v0", Catch)
