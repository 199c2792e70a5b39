"""ManiSkill's motion planner as an expert. A whole demonstration is planned from the seed when an episode begins.

The planner moves the arm by joint positions (`pd_joint_pos`). ManiSkill's own conversion follows that motion with the
environment's actions, as its `replay_trajectory` does. These actions are then taken one by one in the environment itself.
"""

import contextlib
import io
import warnings
from functools import partial
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from difftori.envs.base import Observation
from difftori.envs.family import Arrays, Expert
from difftori.envs.maniskill_names import CONTROL
from difftori.envs.maniskill_simulation import begin_episode, open_simulation

PACKAGES = ("mani-skill", "sapien", "mplib", "gymnasium", "torch")
PLANNED = ("PickCube", "PushCube", "StackCube", "PegInsertionSide")
"""The tasks that ManiSkill's motion planner solves."""


class PlannedEnv(gymnasium.Wrapper):
    """An environment that also shows the planner's next action, `expert` (7), and ends its episodes with the plan.

    `env` is a `ManiskillEnv` with named observations. An episode whose planning fails ends after one step.
    """

    def __init__(self, env: Any, task: str):
        super().__init__(env)
        self._planner = Planner(task)
        self._plan = np.zeros((1, 7), dtype=np.float32)
        self._steps = 0
        self.observation_space = Dict({**env.observation_space.spaces, "expert": Box(-1.0, 1.0, (7,), np.float32)})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode and plan it."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._plan = self._planner.actions(info["episode_seed"])
        self._steps = 0
        return self._shown(observation), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one step. The episode is truncated after the plan's last action."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        over = truncated or self._steps >= len(self._plan)
        return self._shown(observation), float(reward), terminated, over, info

    def close(self) -> None:
        """Free the simulators."""
        self._planner.close()
        self.env.close()

    def _shown(self, observation: Any) -> Observation:
        return {**observation, "expert": self._plan[min(self._steps, len(self._plan) - 1)].copy()}


class Planner:
    """Plans the demonstrations of a task in two simulations of its own."""

    def __init__(self, task: str):
        self._joints = _Recorded(open_simulation(task, obs_mode="none", control="pd_joint_pos"))
        self._hand = _Recorded(open_simulation(task, obs_mode="none"))
        self._solve = import_module("mani_skill.examples.motionplanning.panda.run").MP_SOLUTIONS[f"{task}-v1"]
        self._convert = import_module("mani_skill.trajectory.utils.actions.conversion").from_pd_joint_pos_to_ee

    def actions(self, seed: int) -> np.ndarray:
        """Return the actions (T 7) of the episode of that seed, within ±1; one action, zeros, if no motion is found."""
        # The planner prints why it fails, and uses a deprecated name of SAPIEN.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "component.pose", DeprecationWarning)
            outcome = self._solve(self._joints, seed=seed, debug=False, vis=False)
        moves = list(self._joints.taken)
        if isinstance(outcome, int) or not moves:
            return np.zeros((1, 7), dtype=np.float32)
        self._joints.reset(seed=seed)
        self._hand.reset(seed=seed)
        self._convert(CONTROL, moves, ori_env=self._joints, env=self._hand)
        return np.clip(np.stack(self._hand.taken), -1.0, 1.0)

    def close(self) -> None:
        """Free the simulators."""
        self._joints.close()
        self._hand.close()


class _Recorded(gymnasium.Wrapper):
    """ManiSkill's environment, which keeps the actions `taken` since its last reset, float32."""

    def __init__(self, env: Any):
        super().__init__(env)
        self.taken: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.taken = []
        return begin_episode(self.env, seed)

    def step(self, action: Any) -> Any:
        self.taken.append(np.array(action, dtype=np.float32))
        return self.env.step(action)


def planned_expert(build: Any, task: str, parts: tuple[str, ...]) -> Expert:
    """Create the expert of a task. `build` creates the environment, whose observations `parts` are recorded."""
    return Expert(partial(_build_planned, build, task), _next_action, {part: part for part in parts}, PACKAGES)


def _build_planned(build: Any, task: str) -> PlannedEnv:
    return PlannedEnv(build(), task)


def _next_action(observations: Arrays) -> np.ndarray:
    return observations["expert"]
