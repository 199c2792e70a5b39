"""An environment in one file: keep a cart at the origin. `difftori train tdmpc --env my_env:Cart` learns it."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box

DT, STEPS = 0.1, 100


class Cart(gymnasium.Env):
    """Observation: position and velocity. Action: a force between −5 and 5."""

    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Box(-5.0, 5.0, (1,))

    def __init__(self, friction: float = 0.1):
        self.friction = friction

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.uniform(-1, 1, 2), 0
        return self.state.astype(np.float32), {"success": False}

    def step(self, action):
        position, velocity = self.state
        velocity += DT * (action[0] - self.friction * velocity)
        self.state = np.array([position + DT * velocity, velocity])
        self.steps += 1
        reward = -float(np.sum(self.state**2) + 0.01 * action[0] ** 2)
        info = {"success": bool(np.abs(self.state).max() < 0.05)}
        return self.state.astype(np.float32), reward, False, self.steps == STEPS, info
