"""DeepMind Control (Tassa et al. 2018, arXiv 1801.00690), with state or image observations.

Tasks are named `domain-task`, such as `cheetah-run`. Underscores and capitals are accepted too, and `cup-catch` is the
paper's name of `ball-in-cup-catch`. `lqr` is omitted, because its actions have no bounds. Rewards of repeated steps are
summed. Episodes are truncated after 1000 steps, and terminate only if the task's discount is 0.
"""

import importlib.util
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from difftori.envs.base import (
    OBS_TYPES,
    FrameStack,
    RenderingError,
    choice_fault,
    chosen_task,
    episode_metadata,
    numeric_faults,
    refuse_options,
    rescaled,
)
from difftori.envs.family import EnvFamily
from difftori.envs.opengl import HELP, import_drawing
from difftori.errors import ConfigError, MissingExtraError
from difftori.paper.numbers import paper_tasks

DOMAINS = {
    "cheetah": ("run",),
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
"""Tasks by domain, in dm_control's spelling. Listed here, so that a wrong name is detected without the simulator."""

PARTS = {f"{d}-{t}".replace("_", "-").lower(): (d, t) for d, tasks in DOMAINS.items() for t in tasks}
ALIASES = {"cup-catch": "ball-in-cup-catch"}
TASKS = tuple(PARTS)
EPISODE_STEPS = 1000
ACTION_REPEAT = {ALIASES.get(task.task, task.task): task.action_repeat for task in paper_tasks()}
"""Action repeats of the paper's 15 tasks. The other tasks use `OTHER_REPEAT`."""
OTHER_REPEAT = 2
FRAMES = 3
IMAGE_SIZE = 84
VIDEO = (240, 320)
"""Height and width of `render`'s frames."""


def full_name(task: str) -> str:
    """Return the name in `TASKS` that `task` refers to; "" is the first. Raises `ConfigError` if there is none."""
    plain = task.replace("_", "-").lower()
    return chosen_task(ALIASES.get(plain, plain), TASKS, env="dmc")


class DmcEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A task with actions in [−1, 1]^A. The seed of the reset and the actions determine the episode.

    `obs`: `state`, all observations of the task as float32 (S), or `pixels`, three RGB frames of 84×84 from camera 0
    (quadruped: 2) as uint8 (9, 84, 84); default: `state`. `action_repeat`: steps per action; default: the paper's value, or
    2 for tasks that are not in the paper. `render`: `default` or `fast`. `fast` has shadows of lower resolution and no
    antialiasing. It is several times faster, but the images differ, so results are not comparable.

    Raises `ConfigError`, `MissingExtraError` (extra `dmc`), `RenderingError` (no OpenGL).
    """

    def __init__(self, task: str, *, obs: str = "state", action_repeat: int | None = None, render: str = "default"):
        _refuse_options(obs, action_repeat, render)
        domain, name = PARTS[task]
        self._repeat = action_repeat or ACTION_REPEAT.get(task, OTHER_REPEAT)
        suite = _suite(needs_images=obs == "pixels" or task == "quadruped-escape")
        # The task samples all its randomness from this object, which `reset` seeds. It is seeded here too, because a few
        # tasks sample parts of their model, which must be the same in all copies.
        self._random = np.random.RandomState(0)
        self._env: Any = suite.load(domain, name, task_kwargs={"random": self._random})
        if render == "fast":
            quality = self._env.physics.model.vis.quality
            quality.shadowsize, quality.offsamples = 512, 0
        self._camera = 2 if domain == "quadruped" else 0
        self._frames = FrameStack(FRAMES) if obs == "pixels" else None
        bounds = self._env.action_spec()
        self._low, self._high = bounds.minimum, bounds.maximum
        self.action_space = Box(-1.0, 1.0, bounds.shape, np.float32)
        if obs == "pixels":
            self.observation_space = Box(0, 255, (3 * FRAMES, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
            self._render_image(IMAGE_SIZE, IMAGE_SIZE)
        else:
            size = sum(int(np.prod(spec.shape)) for spec in self._env.observation_spec().values())
            self.observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.render_mode = "rgb_array"
        self.metadata = episode_metadata(
            f"dmc:{task}",
            max_episode_steps=EPISODE_STEPS,
            action_repeat=self._repeat,
            fps=1.0 / (self._env.control_timestep() * self._repeat),
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a new episode. Without a seed, the random stream of the previous episode continues. There are no options."""
        super().reset(seed=seed)
        refuse_options(options, env="dmc")
        fresh = np.random.RandomState(np.random.MT19937(int(self.np_random.integers(2**32))))
        self._random.set_state(fresh.get_state())
        observation = self._env.reset().observation
        if self._frames is None:
            return _flat(observation), {}
        return self._frames.restart(self._render_image(IMAGE_SIZE, IMAGE_SIZE)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Repeat the action (A) `action_repeat` times, or until the episode ends. Rewards are summed."""
        executed = rescaled(action, self._low, self._high)
        reward = 0.0
        for _ in range(self._repeat):
            now = self._env.step(executed)
            reward += now.reward
            if now.last():
                break
        terminated = now.last() and now.discount == 0.0
        if self._frames is None:
            observation = _flat(now.observation)
        else:
            observation = self._frames.push(self._render_image(IMAGE_SIZE, IMAGE_SIZE))
        return observation, reward, terminated, now.last() and not terminated, {}

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Render a frame (240, 320, 3) uint8 for a video. Raises `RenderingError` without OpenGL."""
        return self._render_image(*VIDEO)

    def close(self) -> None:
        """Free the simulator and its OpenGL context."""
        self._env.close()

    def _render_image(self, height: int, width: int) -> np.ndarray:
        try:
            return self._env.physics.render(height, width, camera_id=self._camera)
        except RuntimeError as error:
            raise RenderingError(f"images cannot be rendered ({error}). Fix: {HELP}") from error


FAMILY = EnvFamily(build=DmcEnv, tasks=TASKS, full_name=full_name)


def _refuse_options(obs: str, action_repeat: int | None, render: str) -> None:
    faults = numeric_faults(action_repeat=action_repeat)
    faults += choice_fault("obs", obs, OBS_TYPES) + choice_fault("render", render, ("default", "fast", "warp"))
    if render == "warp":
        faults.append(
            "render is 'warp', which is not supported: mujoco-warp needs a newer MuJoCo than 3.3, the version that dm_control "
            "1.0.28 requires. Fix: choose default or fast"
        )
    if faults:
        raise ConfigError(faults)


def _flat(observation: dict[str, np.ndarray]) -> np.ndarray:
    """Concatenate all entries to float32 (S)."""
    return np.concatenate([np.ravel(value) for value in observation.values()], dtype=np.float32, casting="same_kind")


def _suite(*, needs_images: bool) -> ModuleType:
    """Import dm_control's suite, with headless rendering by MUJOCO_GL (default: EGL), or without rendering if EGL is missing."""
    if importlib.util.find_spec("dm_control") is None:
        raise MissingExtraError(
            "DeepMind Control needs the extra `dmc`. Fix: pip install 'difftori[dmc]' in Python 3.10 to 3.12"
        )
    return import_drawing("dm_control.suite", needs_images=needs_images)
