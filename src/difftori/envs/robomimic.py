"""The tasks of robomimic (Mandlekar et al. 2021, arXiv 2108.03298), simulated by robosuite 1.5.

    state   robomimic's low-dimensional observation as one vector: `object`, then for each arm the position (3) and quaternion
            (4, xyzw) of its hand and its finger positions (2). Its size is 19 for lift, 23 for can and square, 59 for
            transport, 53 for tool_hang
    action  7 numbers for each arm: the hand's motion (1 is 5 cm), its rotation vector (1 is 0.5 rad), both in the world
            frame, and the gripper (−1 opens, 1 closes); 20 actions per second

An episode never terminates, and is truncated after robomimic's limit, 400 or 700 steps. The reward of a step is 1 if the task
is solved after it, else 0. `info["success"]` remains true after the first success: success means success at any step. The
seed and the actions determine an episode, bit by bit.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from difftori.envs.base import Observation, choice_fault, chosen_task, episode_metadata, numeric_faults
from difftori.envs.family import EnvFamily
from difftori.envs.robomimic_simulation import CONTROL_FREQ, TASKS, create_simulation, seed_simulation
from difftori.errors import ConfigError

OBS_TYPES = ("state",)
ARM_PARTS = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}
"""Robomimic's observations of each arm, and their sizes."""


class RobomimicEnv(gymnasium.Env[Observation, np.ndarray]):
    """A task, as described at the head of this file.

    `parts`: the names of the observations, those of robomimic's data sets, or None for the state, as one array. `max_steps`:
    the step after which an episode is truncated.
    """

    def __init__(self, task: str, *, parts: tuple[str, ...] | None, max_steps: int):
        self._task = TASKS[task]
        self.simulation = create_simulation(self._task, absolute=False, needs_images=False)
        self._parts = parts
        self._max_steps = max_steps
        self._steps, self._success = 0, False
        self._seen: dict[str, Any] = {}
        self.action_space = Box(-1.0, 1.0, (7 * self._task.arms,), np.float32)
        known = spaces(task)
        space: Any = known["state"] if parts is None else Dict({name: known[name] for name in parts})
        self.observation_space = space
        self.render_mode = "rgb_array"
        self.metadata = episode_metadata(
            f"robomimic:{task}", max_episode_steps=max_steps, action_repeat=1, fps=float(CONTROL_FREQ)
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a new episode. Without a seed, the previous random stream continues. There are no options."""
        super().reset(seed=seed)
        if options:
            raise ConfigError(
                [
                    f"robomimic: reset options {sorted(options)} are unknown; this environment takes none. Fix: remove them"
                ]
            )
        if seed is not None:
            seed_simulation(self.simulation, seed)
        self.simulation.reset()
        # The positions relative to the hand are one update late.
        self._seen = self.simulation._get_observations(force_update=True)  # noqa: SLF001 (there is no public way to it)
        self._steps, self._success = 0, False
        return self._observation(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one step of 1/20 s."""
        self._seen, *_ = self.simulation.step(np.asarray(action, dtype=np.float64))
        solved = bool(self.simulation._check_success())  # noqa: SLF001 (there is no public way to it)
        self._steps += 1
        self._success = self._success or solved
        truncated = self._steps >= self._max_steps
        return self._observation(), float(solved), False, truncated, {"success": self._success}

    def close(self) -> None:
        """Free the simulator."""
        self.simulation.close()

    def _observation(self) -> Observation:
        if self._parts is None:
            return self._part("state")
        return {name: self._part(name) for name in self._parts}

    def _part(self, name: str) -> np.ndarray:
        if name == "state":
            return np.concatenate([self._part("object"), self._part("agent_pos")])
        if name == "agent_pos":
            return np.concatenate([self._part(part) for part in arm_parts(self._task.arms)])
        return np.asarray(self._seen["object-state" if name == "object" else name], dtype=np.float32)


def arm_parts(arms: int) -> tuple[str, ...]:
    """Return robomimic's names of the observations of all arms, in the order of `state` and `agent_pos`."""
    return tuple(f"robot{arm}_{part}" for arm in range(arms) for part in ARM_PARTS)


def spaces(task: str) -> dict[str, Box]:
    """Return the spaces of all observations of a task that `RobomimicEnv` can return, by name."""
    arms, size = TASKS[task].arms, TASKS[task].object_size
    sizes = {f"robot{arm}_{part}": n for arm in range(arms) for part, n in ARM_PARTS.items()}
    sizes |= {"object": size, "agent_pos": 9 * arms, "state": size + 9 * arms}
    return {name: Box(-np.inf, np.inf, (n,), np.float32) for name, n in sizes.items()}


def full_name(task: str) -> str:
    """Return the name in `TASKS` that `task` refers to; "" is the first. Raises `ConfigError` if there is none."""
    return chosen_task(task.replace("-", "_").lower(), tuple(TASKS), env="robomimic")


def build(task: str, *, obs: str = "state", max_steps: int | None = None) -> RobomimicEnv:
    """Build a task. `obs`: `state`. `max_steps`: the step after which an episode is truncated. Default: robomimic's limit.

    Raises `ConfigError` and `MissingExtraError` (extra `robomimic`).
    """
    faults = choice_fault("obs", obs, OBS_TYPES) + numeric_faults(max_steps=max_steps)
    if faults:
        raise ConfigError(faults)
    return RobomimicEnv(task, parts=None, max_steps=max_steps or TASKS[task].max_steps)


FAMILY = EnvFamily(
    build=build,
    tasks=tuple(TASKS),
    full_name=full_name,
    window=(2, 16, 8),  # as in Diffusion Policy
)
