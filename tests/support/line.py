"""Point on a line, one action, for the loop of reinforcement learning: seeded or not, with a success to report."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box


class Line(gymnasium.Env):
    """Episodes of 6 steps with the reward 1 for each. Success: the point was ever above `goal`. `hidden` noise does not come from the seed."""

    metadata = {"render_modes": [], "max_episode_steps": 6}

    def __init__(self, hidden: str = "none", goal: float = 0.0):
        self.hidden, self.goal = hidden, goal
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._x, self._time = self.np_random.uniform(-1.0, 1.0), 0
        if self.hidden == "reset":
            self._x += np.random.rand()
        return self._seen(), {}

    def step(self, action):
        self._x += 0.1 * float(action[0])
        if self.hidden == "step":
            self._x += np.random.rand()
        self._time += 1
        return self._seen(), 1.0, False, self._time == 6, {"success": self._x > self.goal}

    def _seen(self):
        return np.array([self._x, self._time], np.float32)
