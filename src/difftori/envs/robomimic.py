"""The tasks of robomimic (Mandlekar et al. 2021, arXiv 2108.03298), simulated by robosuite 1.5.

    state   robomimic's low-dimensional observation as one vector: `object`, then for each arm the position (3) and quaternion
            (4, xyzw) of its hand and its finger positions (2). Its size is 19 for lift, 23 for can and square, 59 for
            transport, 53 for tool_hang
    image   the images of the task's cameras, such as `agentview_image` (3 84 84) uint8, with 240 pixels for tool_hang, and
            `agent_pos` (9 for each arm), the state without `object`
    action  `delta`: 7 numbers for each arm: the hand's motion (1 is 5 cm), its rotation vector (1 is 0.5 rad), both in the
            world frame, and the gripper (−1 opens, 1 closes). `absolute`: 10 numbers for each arm: the goal of the hand in the
            world frame, in metres within the task's workspace, the first two rows of its rotation matrix, and the gripper.
            20 actions per second

An episode terminates when the task is solved, with a reward of 1 and `info["success"]`, as in robomimic's evaluations; other
rewards are 0. It is truncated after robomimic's limit, 400 or 700 steps. The seed and the actions determine an episode, bit
by bit.
"""

from collections.abc import Callable, Mapping
from functools import partial
from operator import itemgetter
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from difftori.envs.base import (
    Observation,
    as_numbers,
    choice_fault,
    chosen_task,
    episode_metadata,
    numeric_faults,
    refuse_options,
)
from difftori.envs.family import EnvFamily, Expert
from difftori.envs.robomimic_actions import ABSOLUTE, MOTION, controller_goals
from difftori.envs.robomimic_camera import Camera
from difftori.envs.robomimic_demos import from_recorded, recorded
from difftori.envs.robomimic_experts import make_script
from difftori.envs.robomimic_simulation import (
    ARM_PARTS,
    CONTROL_FREQ,
    TASKS,
    arm_parts,
    create_simulation,
    image_parts,
)
from difftori.envs.robomimic_stages import Script
from difftori.envs.robomimic_state import reset_to_seed, reset_to_state, set_state
from difftori.errors import ConfigError

OBS_TYPES = ("state", "image")
ACTION_TYPES = ("delta", "absolute")
HOLD_STEPS = 10
"""Steps for which a task is solved at the end of a demonstration, as when people record them in robosuite."""
VIDEO = 240
"""Side of the frames of `render`, in pixels."""


class RobomimicEnv(gymnasium.Env[Observation, np.ndarray]):
    """A task, as described at the head of this file. `simulation` is robosuite's environment.

    `parts`: the names of the observations, those of robomimic's data sets and of `spaces`, or None for the state, as one array.
    `actions`: `delta` or `absolute`. `reflections`: whether surfaces in images reflect. `max_steps`: the step after which an
    episode is truncated. `script` creates an expert, whose action is the observation `expert`; then an episode terminates when
    the task has been solved for `HOLD_STEPS` steps in a row.
    """

    def __init__(
        self,
        task: str,
        *,
        parts: tuple[str, ...] | None,
        actions: str,
        reflections: bool,
        max_steps: int,
        script: Callable[[], Script] | None = None,
    ):
        self._task = TASKS[task]
        self._absolute = actions == "absolute"
        needs_images = any(name.endswith("_image") for name in parts or ())
        self.simulation = create_simulation(self._task, absolute=self._absolute, needs_images=needs_images)
        self._camera = Camera(self.simulation, reflections=reflections)
        self._parts = parts
        self._script = None if script is None else script()
        self._max_steps = max_steps
        self._steps, self._success, self._held = 0, False, 0
        self._seen: dict[str, Any] = {}
        self.action_space = action_space(task, actions)
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
        """Begin a new episode. Without a seed, the previous random stream continues.

        Options: `reset_to_state`, a row of robomimic's `states`, from which the episode begins, and `model_file`, the model of its
        episode, which Lift and Transport need. What a state does not contain, such as forces of contacts, differs slightly from
        the recorded episode.
        """
        super().reset(seed=seed)
        refuse_options(options, env="robomimic", known=("reset_to_state", "model_file"))
        given = options or {}
        state, model_file = given.get("reset_to_state"), given.get("model_file")
        if state is None:
            reset_to_seed(self.simulation, seed)
        else:
            reset_to_state(self.simulation, self._task, as_numbers(state), model_file)
        self._look()
        if self._script is not None:
            # A stream other than that of the simulation, which has the same seed.
            self._script.reset(self.simulation, np.random.default_rng(self.np_random.integers(2**63)))
        self._steps, self._success, self._held = 0, False, 0
        return self._observation(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one step of 1/20 s. Raises `NonFiniteError` for an absolute action without a rotation."""
        command = np.asarray(action, dtype=np.float64)
        self._seen, *_ = self.simulation.step(controller_goals(command) if self._absolute else command)
        solved = bool(self.simulation._check_success())  # noqa: SLF001 (there is no public way to it)
        self._steps += 1
        self._success = self._success or solved
        self._held = self._held + 1 if solved else 0
        terminated = self._held >= (1 if self._script is None else HOLD_STEPS)
        truncated = self._steps >= self._max_steps
        return self._observation(), float(solved), terminated, truncated, {"success": self._success}

    def shown(self, state: np.ndarray) -> Observation:
        """Return the observation in another state of the episode's model, a row of robomimic's `states`. No step is taken."""
        set_state(self.simulation, state)
        self._look()
        return self._observation()

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Render a frame (240, 240, 3) uint8 for a video. Raises `RenderingError` without OpenGL."""
        return self._camera.image(self._task.cameras[0], VIDEO)

    def close(self) -> None:
        """Free the simulator and its OpenGL contexts."""
        self._camera.close()
        self.simulation.close()

    def _look(self) -> None:
        """Update the observations. Positions relative to the hand are one update late."""
        for _ in range(2):
            self._seen = self.simulation._get_observations(force_update=True)  # noqa: SLF001 (there is no public way)

    def _observation(self) -> Observation:
        if self._parts is None:
            return self._part("state")
        return {name: self._part(name) for name in self._parts}

    def _part(self, name: str) -> np.ndarray:
        if name == "state":
            return np.concatenate([self._part("object"), self._part("agent_pos")])
        if name == "agent_pos":
            return np.concatenate([self._part(part) for part in arm_parts(self._task.arms)])
        if name.endswith("_image"):
            return self._camera.image(name.removesuffix("_image"), self._task.side).transpose(2, 0, 1)
        if name == "expert":
            assert self._script is not None
            return self._script.act(self.simulation).astype(np.float32)
        return np.asarray(self._seen["object-state" if name == "object" else name], dtype=np.float32)


def spaces(task: str) -> Mapping[str, Box]:
    """Return the spaces of all observations of a task that `RobomimicEnv` can return, by name."""
    arms, size, side = TASKS[task].arms, TASKS[task].object_size, TASKS[task].side
    sizes = {f"robot{arm}_{part}": n for arm in range(arms) for part, n in ARM_PARTS.items()}
    sizes |= {"object": size, "agent_pos": 9 * arms, "state": size + 9 * arms, "expert": MOTION * arms}
    found = {name: Box(-np.inf, np.inf, (n,), np.float32) for name, n in sizes.items()}
    return found | {name: Box(0, 255, (3, side, side), np.uint8) for name in image_parts(task)}


def action_space(task: str, actions: str) -> Box:
    """Return the space of the actions of a type, `delta` or `absolute`."""
    arms = TASKS[task].arms
    if actions == "delta":
        return Box(-1.0, 1.0, (MOTION * arms,), np.float32)
    low = [*TASKS[task].low, *[-1.0] * (ABSOLUTE - 3)] * arms
    high = [*TASKS[task].high, *[1.0] * (ABSOLUTE - 3)] * arms
    return Box(np.array(low, dtype=np.float32), np.array(high, dtype=np.float32))


def full_name(task: str) -> str:
    """Return the name in `TASKS` that `task` refers to; "" is the first. Raises `ConfigError` if there is none."""
    return chosen_task(task.replace("-", "_").lower(), tuple(TASKS), env="robomimic")


def build(
    task: str,
    *,
    obs: str = "state",
    actions: str = "delta",
    reflections: bool = True,
    max_steps: int | None = None,
) -> RobomimicEnv:
    """Build a task. `obs`: `state` or `image`. `actions`: `delta` or `absolute`.

    `reflections`: whether surfaces in images reflect, as in robomimic's data sets; without, images are twice as fast.
    `max_steps`: the step after which an episode is truncated. Defaults: `state`, `delta`, True, robomimic's limit.

    Raises `ConfigError`, `MissingExtraError` (extra `robomimic`), `RenderingError` (no OpenGL).
    """
    faults = choice_fault("obs", obs, OBS_TYPES) + choice_fault("actions", actions, ACTION_TYPES)
    faults += numeric_faults(max_steps=max_steps)
    if faults:
        raise ConfigError(faults)
    parts = (*image_parts(task), "agent_pos") if obs == "image" else None
    limit = max_steps or TASKS[task].max_steps
    return RobomimicEnv(task, parts=parts, actions=actions, reflections=reflections, max_steps=limit)


def expert(task: str, *, obs: str = "state") -> Expert:
    """Create the scripted expert of a task, which sees the whole simulation and acts with noise (see `robomimic_experts`).

    It records robomimic's `object` and hands, and with `obs="image"` also the images. Default: `state`.
    """
    faults = choice_fault("obs", obs, OBS_TYPES)
    if faults:
        raise ConfigError(faults)
    stored = recorded(task)
    names = tuple(dict.fromkeys(stored["state"] + (stored["image"] if obs == "image" else ())))
    build_one = partial(
        RobomimicEnv,
        task,
        parts=(*names, "expert"),
        actions="delta",
        reflections=True,
        max_steps=TASKS[task].max_steps,
        script=partial(make_script, task),
    )
    return Expert(build_one, itemgetter("expert"), {name: name for name in names}, ("robosuite", "mujoco", "gymnasium"))


FAMILY = EnvFamily(
    build=build,
    tasks=tuple(TASKS),
    full_name=full_name,
    expert=expert,
    window=(2, 16, 8),  # as in Diffusion Policy
    recorded=recorded,
    from_recorded=from_recorded,
)
