"""Small environments with a known best return of 1, to find bugs in agents. A bug makes one of them unsolvable.

One action a in [−1, 1]. Episodes terminate after a fixed number of steps, and are not truncated. The start s is uniform in
[−1, 1]. Observations are float32. Below each task: what a failure indicates.

    one-step        o = (s)                  r = 1 − (a − 0.7·s)²
                    nothing is learned: bug in the reward model, the policy loss, or the path of the observations to them
    two-step        o₀ = (s, 0)   r₀ = 0     o₁ = (m, 1) with m = a₀ − s/2     r₁ = 1 − m² − (a₁ − m/2 − 0.3)²
                    the first action is random: the value of the next state is not used, or termination is ignored
    delayed-reward  o_t = (s, p, t/8)        p = mean of the first two actions (0 before)     r₇ = 1 − (p − s/2)²
                    8 steps, with the reward at the last: the value must propagate farther than a plan of 5 steps
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from difftori.envs.base import episode_metadata, refuse_options
from difftori.envs.family import EnvFamily

STEPS = {"one-step": 1, "two-step": 2, "delayed-reward": 8}
"""Number of steps of an episode, by task."""
OPTIMAL_RETURN = {"one-step": 1.0, "two-step": 1.0, "delayed-reward": 1.0}
"""The undiscounted return of `optimal_action`, from every start."""
RANDOM_RETURN = {
    "one-step": 1 - (1 + 0.49) / 3,
    "two-step": 1 - 5 / 12 - (1 / 3 + 5 / 48 + 0.09),
    "delayed-reward": 1 - (1 / 6 + 1 / 12),
}
"""The mean return of actions uniform in [−1, 1]: .503, .056, .75."""
TASKS = tuple(STEPS)
SIZES = {"one-step": 1, "two-step": 2, "delayed-reward": 3}
"""Observation dimension S, by task."""
LEADING = 2
"""Number of first actions that determine the reward in `delayed-reward`."""


def optimal_action(task: str, observations: np.ndarray) -> np.ndarray:
    """Return the best actions (B 1) for observations (B S) of a task in `TASKS`."""
    first = np.asarray(observations, dtype=np.float64)[:, :1]
    if task == "one-step":
        return 0.7 * first
    if task == "two-step":
        return np.where(np.asarray(observations)[:, 1:] < 0.5, first / 2, np.clip(first / 2 + 0.3, -1.0, 1.0))
    return first / 2


class ProbeEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A task in `TASKS`, with the equations at the head of this file."""

    def __init__(self, task: str):
        self._task = task
        self.observation_space = Box(-2.0, 2.0, (SIZES[task],), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.metadata = {
            **episode_metadata(f"probe:{task}", max_episode_steps=STEPS[task], action_repeat=1),
            "render_modes": [],
        }
        self._start = 0.0
        self._memory = 0.0
        self._time = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode at a random start. There are no options."""
        super().reset(seed=seed)
        refuse_options(options, env="probe")
        self._start = float(self.np_random.uniform(-1.0, 1.0))
        self._memory = 0.0
        self._time = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take a step. The episode terminates after those of `STEPS`."""
        reward = self._advance(float(action[0]))
        self._time += 1
        return self._observation(), reward, self._time == STEPS[self._task], False, {}

    def _advance(self, action: float) -> float:
        """Return the reward of one step, and update the memory."""
        if self._task == "one-step":
            return 1.0 - (action - 0.7 * self._start) ** 2
        if self._task == "two-step":
            if self._time == 0:
                self._memory = action - self._start / 2
                return 0.0
            return 1.0 - self._memory**2 - (action - self._memory / 2 - 0.3) ** 2
        if self._time < LEADING:
            self._memory += action / LEADING
        last = self._time == STEPS[self._task] - 1
        return 1.0 - (self._memory - self._start / 2) ** 2 if last else 0.0

    def _observation(self) -> np.ndarray:
        if self._task == "one-step":
            values = [self._start]
        elif self._task == "two-step":
            values = [self._start, 0.0] if self._time == 0 else [self._memory, 1.0]
        else:
            values = [self._start, self._memory, self._time / STEPS[self._task]]
        return np.array(values, dtype=np.float32)


FAMILY = EnvFamily(build=ProbeEnv, tasks=TASKS)
