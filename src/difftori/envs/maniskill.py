"""ManiSkill 3 (Tao et al. 2024, arXiv 2410.00425): manipulation in SAPIEN, with state or point cloud observations.

    state   the robot, the objects and the goal; 42 numbers in PickCube
    points  `point_cloud` (1200 6), see `maniskill_cloud`, and `agent_pos` (25): joint positions, velocities, the tool's pose
    action  7 numbers: the requested motion of the hand (0.1 m, −0.1 rad, in the axes of the base), and the gripper (1: open)

Tasks have the paper's names, such as `PickCube`; `PickCube-v1` and `pick-cube` are the same. Episodes are truncated after 200
steps and never terminate. `info["success"]` remains true after the first success: success means success at any step.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from difftori.envs.base import Observation, choice_fault, chosen_task, episode_metadata, numeric_faults, refuse_options
from difftori.envs.family import Arrays, EnvFamily, Expert
from difftori.envs.maniskill_bridge import BridgedSimulation
from difftori.envs.maniskill_cloud import COLUMNS, POINTS, policy_cloud, robot_state
from difftori.envs.maniskill_experts import PLANNED, planned_expert
from difftori.envs.maniskill_names import MANISKILL2, ROBOTS
from difftori.envs.maniskill_simulation import FPS, LocalSimulation, Simulation
from difftori.errors import ConfigError

TASKS = (*ROBOTS, *MANISKILL2)
OBS_TYPES = ("state", "points")
PARTS = {"state": ("state",), "points": ("point_cloud", "agent_pos")}
"""For each `obs`, the names of its observations, which are also the arrays of a collected data set."""
LIMITS = {"Fill": 250, "Excavate": 250, "Hang": 350, "Pour": 350}
EPISODE_STEPS = 200
"""Limit of the tasks that are not in `LIMITS`. All are those of ManiSkill 2; the limits of ManiSkill 3, 50 or 100 steps, end
before its demonstrations do."""


def full_name(task: str) -> str:
    """Return the name in `TASKS` that `task` refers to; "" is the first. Raises `ConfigError` if there is none."""
    plain = {_plain(name): name for name in TASKS}
    return plain.get(_plain(task)) or chosen_task(task, TASKS, env="maniskill")


class ManiskillEnv(gymnasium.Env[Observation, np.ndarray]):
    """A task, as described at the head of this file. The seed of the reset and the actions determine the episode.

    `obs` is in `OBS_TYPES`. `named`: the state is a dictionary of one array too. `max_steps`: the step after which an episode
    is truncated. `info["episode_seed"]` of a reset is the seed of the episode.
    """

    def __init__(self, task: str, *, obs: str, max_steps: int, named: bool = False):
        simulation = BridgedSimulation if task in MANISKILL2 else LocalSimulation
        self._env: Simulation = simulation(task, obs=obs)
        self._max_steps = max_steps
        self._steps, self._success = 0, False
        self._obs, self._named = obs, named
        self._rng = np.random.default_rng(0)
        shown = self._env.shapes
        parts = _points_parts(shown) if obs == "points" else {"state": _numbers(shown["state"])}
        space: Any = Dict(parts) if obs == "points" or named else parts["state"]  # pyright: ignore[reportArgumentType]
        self.observation_space = space
        self.action_space = self._env.action_space
        self.render_mode = "rgb_array"
        self.metadata = episode_metadata(f"maniskill:{task}", max_episode_steps=max_steps, action_repeat=1, fps=FPS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a new episode. Without a seed, the previous random stream continues. There are no options."""
        super().reset(seed=seed)
        refuse_options(options, env="maniskill")
        episode = int(self.np_random.integers(2**31)) if seed is None else seed % 2**32
        self._rng = np.random.default_rng(episode)
        first = self._env.reset(episode)
        self._steps, self._success = 0, first.success
        return self._observation(first.arrays), {"success": self._success, "episode_seed": episode}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one step of 1/20 s."""
        step = self._env.step(np.asarray(action, dtype=np.float32))
        self._steps += 1
        self._success = self._success or step.success
        truncated = self._steps >= self._max_steps
        return self._observation(step.arrays), step.reward, False, truncated, {"success": self._success}

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Render a frame (512, 512, 3) uint8 for a video."""
        return self._env.render()

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def _observation(self, shown: Arrays) -> Observation:
        if self._obs == "state":
            return {"state": shown["state"]} if self._named else shown["state"]
        tcp, goal = shown.get("tcp_pose"), shown.get("goal_pos")
        return {
            "point_cloud": policy_cloud(shown["xyzw"], shown["rgb"], tcp, goal, self._rng),
            "agent_pos": robot_state(shown["qpos"], shown["qvel"], tcp),
        }


def build(task: str, *, obs: str = "state", max_steps: int | None = None) -> ManiskillEnv:
    """Build a task. `obs`: `state`, or `points`, that is `point_cloud` (1200 6) and `agent_pos` (25); both float32.

    `max_steps`: the step after which an episode is truncated. Defaults: `state`, 200 (`LIMITS`). The tasks in `MANISKILL2` run in
    the interpreter at the path in DIFFTORI_MANISKILL2_PYTHON. Raises `ConfigError`, `MissingExtraError` (extra `maniskill`),
    `RenderingError` (no Vulkan).
    """
    if faults := choice_fault("obs", obs, OBS_TYPES) + numeric_faults(max_steps=max_steps):
        raise ConfigError(faults)
    limit = LIMITS.get(task, EPISODE_STEPS) if max_steps is None else max_steps
    return ManiskillEnv(task, obs=obs, max_steps=limit)


def expert(task: str, *, obs: str = "state") -> Expert:
    """Create the expert of a task: ManiSkill's motion planner, see `maniskill_experts`.

    It records the observations of `obs`: `state`, or `point_cloud` and `agent_pos`. Default: `state`.
    """
    if faults := choice_fault("obs", obs, OBS_TYPES):
        raise ConfigError(faults)
    if task not in PLANNED:
        raise ConfigError([f"maniskill: {task} has no expert. Fix: choose one of {', '.join(PLANNED)}"])
    build_one = partial(ManiskillEnv, task, obs=obs, max_steps=EPISODE_STEPS, named=True)
    return planned_expert(build_one, task, PARTS[obs])


def from_recorded(
    stored: Arrays, actions: np.ndarray, *, task: str, obs: str, about: Mapping[str, Any]
) -> tuple[Arrays, np.ndarray]:
    """Return recorded observations (T, …) of the type `obs`, and actions (T, A) clipped to ±1, as executed.

    Raises `ConfigError` for data of another task or robot: `about` is the metadata of a file of ManiSkill, or of
    `difftori collect`.
    """
    _refuse_other_data(task, about)
    return {name: stored[name] for name in PARTS[obs]}, np.clip(actions, -1.0, 1.0)


FAMILY = EnvFamily(
    build=build,
    tasks=TASKS,
    full_name=full_name,
    expert=expert,
    recorded=PARTS,
    from_recorded=from_recorded,
)


def _plain(name: str) -> str:
    """Return a task's name without its version, hyphens and capitals."""
    return name.lower().replace("-", "").replace("_", "").removesuffix("v1").removesuffix("v0")


def _refuse_other_data(task: str, about: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for data of another task or robot than those of the environment, or of an unknown task."""
    if "env_id" in about:
        found = "maniskill:" + re.sub(r"-v\d+$", "", str(about["env_id"]))
    else:
        found = str(about.get("env", "no environment"))
    if found != f"maniskill:{task}":
        raise ConfigError(
            [
                f"demos: the metadata name {found!r}, not maniskill:{task}. Fix: choose another --env, or give a file of ManiSkill or "
                "of difftori collect of this task"
            ]
        )
    robot = ROBOTS.get(task)
    if robot is not None and about.get("robot_uids", robot) != robot:
        raise ConfigError(
            [
                f"demos: recorded with the robot {about['robot_uids']!r}, but maniskill:{task} has {robot!r}. Fix: give "
                f"demonstrations of {robot!r}"
            ]
        )


def _numbers(shape: tuple[int, ...]) -> Box:
    return Box(-np.inf, np.inf, shape, np.float32)


def _points_parts(shapes: dict[str, tuple[int, ...]]) -> dict[str, Box]:
    """Return the observations `points` of a simulation with arrays of these shapes."""
    robot = sum(shapes[name][0] for name in ("qpos", "qvel", "tcp_pose") if name in shapes)
    return {"point_cloud": _numbers((POINTS, COLUMNS)), "agent_pos": _numbers((robot,))}
