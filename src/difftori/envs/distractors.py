"""Distractors: numbers appended to an observation that say nothing about the task, to make a model of the observations harder."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from difftori.envs.base import numeric_faults
from difftori.errors import ConfigError

RHO = 0.95
"""Correlation of a distractor between successive agent steps."""
_STREAM = 0xD157
"""Second part of the seed, so that the distractors share no random numbers with an environment of the same seed."""


class Distractors(gymnasium.Wrapper):
    """Appends `count` distractors x to the observation (S) of `env`: float32 (S + count).

    Each is an autoregressive process of order 1, x' = ρ x + √(1 − ρ²) ε with standard normal ε, of mean 0 and variance 1 at every
    step, independent of states and actions. The seed of the reset determines the whole process, so an episode is repeated by
    its seed and actions, as without distractors. A reset without a seed continues the stream of random numbers.

    Raises `ConfigError` if the observation is no vector, or `count` is below 1. `name`: the environment's name in messages.
    """

    def __init__(self, env: gymnasium.Env, count: int, *, name: str = "the environment"):
        super().__init__(env)
        space = env.observation_space
        if faults := numeric_faults(distractors=count) or _faults(space, name):
            raise ConfigError(faults)
        assert isinstance(space, Box)
        low, high = (
            np.append(bound, np.full(count, end)) for bound, end in ((space.low, -np.inf), (space.high, np.inf))
        )
        self.observation_space = Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        parts = env.metadata.get("flattened") or (("state", space.shape),)
        self.metadata = {**env.metadata, "flattened": (*parts, ("distractors", (count,)))}
        self._random = np.random.default_rng()
        self._values = np.zeros(count)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode, with distractors from their stationary distribution."""
        observation, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self._random = np.random.default_rng((seed, _STREAM))
        self._values = self._random.standard_normal(len(self._values))
        return self._appended(observation), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Take one agent step, and one step of the distractors."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        noise = self._random.standard_normal(len(self._values))
        self._values = RHO * self._values + np.sqrt(1 - RHO**2) * noise
        return self._appended(observation), reward, terminated, truncated, info

    def _appended(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate((observation, self._values), dtype=np.float32, casting="same_kind")


def _faults(space: gymnasium.Space, name: str) -> list[str]:
    """Return an error message if observations of this space are no vectors."""
    if isinstance(space, Dict):
        return [
            f"--distractors: the observations of {name} are a dictionary. Fix: make one vector of them, --flatten-obs"
        ]
    if not isinstance(space, Box) or len(space.shape) != 1:
        return [
            f"--distractors: the observations of {name} are {space}, no vectors. Fix: choose --obs state, or remove --distractors"
        ]
    return []
