"""MetaWorld v3 (Yu et al. 2019, arXiv 1910.10897): 50 tasks of a Sawyer arm, with state or point cloud observations.

    state   39 numbers: the hand, the objects, both one step earlier, and the goal
    points  `point_cloud` (512 3), metres, computed as in DP3, and `agent_pos` (9): hand and both fingers
    action  4 numbers: the hand's motion (1 is a centimetre per step) and the gripper's effort

Episodes are truncated after 200 steps, as in DP3, and never terminate. `info["success"]` remains true after the first
success, because in several tasks the goal is left again: success means success at any step. Tasks have the paper's names,
such as `assembly`; `assembly-v3` is the same. Each episode has its own goal, determined by its seed.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from difftori.envs.base import Observation, choice_fault, chosen_task, episode_metadata, numeric_faults, refuse_options
from difftori.envs.family import EnvFamily, Expert
from difftori.envs.metaworld_camera import POINTS, Camera
from difftori.envs.opengl import import_drawing
from difftori.errors import ConfigError, MissingExtraError
from difftori.paper.numbers import paper_numbers

PAPER_TASKS = tuple(dict.fromkeys(number.task for number in paper_numbers("table1_metaworld_success_percent")))
"""The 22 tasks of the paper's Table 1, in its order."""
OTHER_TASKS = (
    "button-press",
    "button-press-topdown",
    "button-press-topdown-wall",
    "button-press-wall",
    "coffee-button",
    "dial-turn",
    "door-close",
    "door-lock",
    "door-open",
    "door-unlock",
    "drawer-close",
    "drawer-open",
    "faucet-close",
    "faucet-open",
    "handle-press",
    "handle-press-side",
    "handle-pull",
    "handle-pull-side",
    "lever-pull",
    "peg-unplug-side",
    "plate-slide",
    "plate-slide-back",
    "plate-slide-back-side",
    "plate-slide-side",
    "reach",
    "reach-wall",
    "window-close",
    "window-open",
)
"""The other tasks of MetaWorld. Listed here, so that a wrong name is detected without the simulator."""
TASKS = (*PAPER_TASKS, *OTHER_TASKS)
OBS_TYPES = ("state", "points")
EPISODE_STEPS = 200
STEP_LIMIT = 500
"""MetaWorld's limit of steps in an episode."""
FPS = 80.0

SPACES = {
    "state": Box(-np.inf, np.inf, (39,), np.float32),
    "agent_pos": Box(-np.inf, np.inf, (9,), np.float32),
    "point_cloud": Box(-np.inf, np.inf, (POINTS, 3), np.float32),
}
POINT_PARTS = ("point_cloud", "agent_pos")
ARRAYS = {"state": "agent_pos", "full_state": "state", "point_cloud": "point_cloud"}
"""Maps DP3's names of the recorded arrays to the names of the observations."""
RECORDED = {"state": ("full_state",), "points": ("point_cloud", "state")}
"""For each `obs`, the arrays of a collected or DP3 data set that it is computed from."""


def full_name(task: str) -> str:
    """Return the name in `TASKS` that `task` refers to; "" is the first. Raises `ConfigError` if there is none."""
    plain = task.replace("_", "-").lower().removesuffix("-goal-observable").removesuffix("-v3")
    return chosen_task(plain, TASKS, env="metaworld")


class MetaworldEnv(gymnasium.Env[Observation, np.ndarray]):
    """A task, as described at the head of this file. The seed of the reset and the actions determine the episode.

    `parts`: the names of the observations in `SPACES`, or None for the state only, as one array. `max_steps`: the step after
    which an episode is truncated.
    """

    def __init__(self, task: str, *, parts: tuple[str, ...] | None, max_steps: int):
        self._env = _simulation(task, needs_images=parts is not None and "point_cloud" in parts)
        self._camera = Camera(self._env)
        self._parts = parts
        self._max_steps = max_steps
        self._steps, self._success = 0, False
        self._state = np.zeros(39, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (4,), np.float32)
        space: Any = SPACES["state"] if parts is None else Dict({name: SPACES[name] for name in parts})
        self.observation_space = space
        self.render_mode = "rgb_array"
        self.metadata = episode_metadata(f"metaworld:{task}", max_episode_steps=max_steps, action_repeat=1, fps=FPS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a new episode with a new goal. Without a seed, the previous random stream continues. There are no options."""
        super().reset(seed=seed)
        refuse_options(options, env="metaworld")
        if seed is not None:
            self._env.seed(seed)
        state, _ = self._env.reset()
        self._camera.refresh()
        self._steps, self._success = 0, False
        return self._observation(state), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one step of MetaWorld, 1/80 s."""
        state, reward, _, _, info = self._env.step(np.asarray(action, dtype=np.float32))
        self._steps += 1
        self._success = self._success or bool(info["success"])
        truncated = self._steps >= self._max_steps
        return self._observation(state), float(reward), False, truncated, {"success": self._success}

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Render a frame (240, 240, 3) uint8 for a video. Raises `RenderingError` without OpenGL."""
        return self._camera.image()

    def close(self) -> None:
        """Free the simulator and its OpenGL contexts."""
        self._camera.close()
        self._env.close()

    def _observation(self, state: np.ndarray) -> Observation:
        self._state = state.astype(np.float32)
        if self._parts is None:
            return self._state
        return {name: self._part(name) for name in self._parts}

    def _part(self, name: str) -> np.ndarray:
        if name == "point_cloud":
            return self._camera.cloud()
        if name == "state":
            return self._state
        fingers = [self._env.data.site(f"{side}EndEffector").xpos for side in ("right", "left")]
        return np.concatenate([self._env.get_endeff_pos(), *fingers]).astype(np.float32)


def build(task: str, *, obs: str = "state", max_steps: int = EPISODE_STEPS) -> MetaworldEnv:
    """Build a task. `obs`: `state`, float32 (39), or `points`, `point_cloud` (512 3) and `agent_pos` (9), both float32.

    `max_steps`: the step after which an episode is truncated, at most 500. Defaults: `state`, 200. Raises `ConfigError`,
    `MissingExtraError` (extra `metaworld`), `RenderingError` (no OpenGL).
    """
    faults = choice_fault("obs", obs, OBS_TYPES) + numeric_faults(max_steps=max_steps)
    if max_steps > STEP_LIMIT:
        faults.append(f"max_steps is {max_steps}; it must be at most {STEP_LIMIT}, MetaWorld's limit")
    if faults:
        raise ConfigError(faults)
    return MetaworldEnv(task, parts=POINT_PARTS if obs == "points" else None, max_steps=max_steps)


def from_recorded(
    stored: dict[str, np.ndarray], actions: np.ndarray, *, obs: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return recorded observations (T, …) with the environment's names, and actions clipped to ±1, as executed."""
    return {ARRAYS[name]: stored[name] for name in RECORDED[obs]}, np.clip(actions, -1.0, 1.0)


def expert(task: str, *, obs: str = "points") -> Expert:
    """Create the expert that MetaWorld's authors scripted for the task. It sees the full state.

    It records DP3's `state` (9) of the robot and `full_state` (39), and with `obs="points"` (default) also `point_cloud`
    (512 3).
    """
    faults = choice_fault("obs", obs, OBS_TYPES)
    if faults:
        raise ConfigError(faults)
    recorded = {stored: part for stored, part in ARRAYS.items() if obs == "points" or part != "point_cloud"}
    build_one = partial(MetaworldEnv, task, parts=tuple(recorded.values()), max_steps=EPISODE_STEPS)
    return Expert(build_one, _script(task), recorded, ("metaworld", "mujoco", "gymnasium", "fpsample"))


FAMILY = EnvFamily(
    build=build,
    tasks=TASKS,
    full_name=full_name,
    expert=expert,
    window=(2, 4, 3),  # as in DP3
    recorded=RECORDED,
    from_recorded=from_recorded,
)


def _simulation(task: str, *, needs_images: bool) -> Any:
    """Create MetaWorld's environment, with the goal in its state and a new goal in every episode."""
    if importlib.util.find_spec("metaworld") is None:
        raise MissingExtraError("MetaWorld needs the extra `metaworld`. Fix: pip install 'difftori[metaworld]'")
    known = import_drawing("metaworld.env_dict", needs_images=needs_images).ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    # This seed only avoids the use of NumPy's global generator; `reset` seeds the episodes.
    simulation = known[f"{task}-v3-goal-observable"](seed=0)
    # Otherwise every episode would have the goal of the first, or one from NumPy's global generator.
    vars(simulation).update(_freeze_rand_vec=False, seeded_rand_vec=True)
    return simulation


def _script(task: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Return the script of MetaWorld's authors: a function of observations by name to actions (num_envs 4), not clipped."""
    known = import_drawing("metaworld.policies", needs_images=False).ENV_POLICY_MAP
    script = known[f"{task}-v3"]()

    def act(observations: dict[str, np.ndarray]) -> np.ndarray:
        with warnings.catch_warnings():
            # The scripts request more than ±1 intentionally, and MetaWorld warns about it.
            warnings.filterwarnings("ignore", "Constant.* may be too high")
            return np.stack([script.get_action(state) for state in observations["state"]])

    return act
