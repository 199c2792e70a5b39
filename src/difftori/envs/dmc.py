"""DeepMind Control (Tassa et al. 2018, arXiv 1801.00690), from states or from pictures.

A task is named `domain-task`, as in `cheetah-run`; underscores and capitals may stand for hyphens and small letters,
and `cup-catch` is the paper's name of `ball-in-cup-catch`. `lqr` is left out: its actions have no bounds. Rewards of
repeated steps are summed; episodes are truncated after 1000 steps and terminate only where the task's discount is 0.
"""

import importlib.util
from functools import partial
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from difftori.envs.base import (
    OBSERVE,
    FrameStack,
    RenderingError,
    choice_fault,
    chosen_task,
    episode_metadata,
    numeric_faults,
    rescaled,
)
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.opengl import HELP, import_drawing
from difftori.envs.workers import TIMEOUT, launch
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
"""Tasks by domain, as dm_control writes them. Here rather than asked for, so that a wrong name needs no simulator."""

PARTS = {f"{d}-{t}".replace("_", "-").lower(): (d, t) for d, tasks in DOMAINS.items() for t in tasks}
ALIASES = {"cup-catch": "ball-in-cup-catch"}
TASKS = tuple(PARTS)
EPISODE_STEPS = 1000
ACTION_REPEAT = {ALIASES.get(task.task, task.task): task.action_repeat for task in paper_tasks()}
"""The paper's, for its 15 tasks; `OTHER_REPEAT` for the others."""
OTHER_REPEAT = 2
FRAMES = 3
PICTURE = 84
VIDEO = (240, 320)
"""Height and width of `render`'s frames."""


def full_name(task: str) -> str:
    """The name in `TASKS` that `task` means; "" is the first. `ConfigError` if there is none."""
    plain = task.replace("_", "-").lower()
    return chosen_task(ALIASES.get(plain, plain), TASKS, env="dmc")


class DmcEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One task with actions in [−1, 1]^A; see `make`. An episode is determined by the seed of its reset and its actions."""

    def __init__(self, task: str, *, obs: str, action_repeat: int, render: str):
        domain, name = PARTS[task]
        suite = _suite(needs_pictures=obs == "pixels" or task == "quadruped-escape")
        # The task draws all its randomness from this object, which `reset` seeds. It is seeded here too because a few
        # tasks draw parts of their model, which must be the same in all copies.
        self._random = np.random.RandomState(0)
        self._env: Any = suite.load(domain, name, task_kwargs={"random": self._random})
        if render == "fast":
            quality = self._env.physics.model.vis.quality
            quality.shadowsize, quality.offsamples = 512, 0
        self._camera = 2 if domain == "quadruped" else 0
        self._frames = FrameStack(FRAMES) if obs == "pixels" else None
        self._repeat = action_repeat
        bounds = self._env.action_spec()
        self._low, self._high = bounds.minimum, bounds.maximum
        self.action_space = Box(-1.0, 1.0, bounds.shape, np.float32)
        if obs == "pixels":
            self.observation_space = Box(0, 255, (3 * FRAMES, PICTURE, PICTURE), np.uint8)
            self._picture(PICTURE, PICTURE)
        else:
            size = sum(int(np.prod(spec.shape)) for spec in self._env.observation_spec().values())
            self.observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.render_mode = "rgb_array"
        self.metadata = episode_metadata(
            f"dmc:{task}",
            max_episode_steps=EPISODE_STEPS,
            action_repeat=action_repeat,
            fps=1.0 / (self._env.control_timestep() * action_repeat),
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode; without a seed the stream of the last one goes on. There are no options."""
        super().reset(seed=seed)
        if options:
            raise ConfigError([f"dmc: reset options {sorted(options)} are unknown; this environment takes none"])
        fresh = np.random.RandomState(np.random.MT19937(int(self.np_random.integers(2**32))))
        self._random.set_state(fresh.get_state())
        observation = self._env.reset().observation
        if self._frames is None:
            return _flat(observation), {}
        return self._frames.restart(self._picture(PICTURE, PICTURE)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take the action (A) `action_repeat` times, or until the episode ends."""
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
            observation = self._frames.push(self._picture(PICTURE, PICTURE))
        return observation, reward, terminated, now.last() and not terminated, {}

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A frame (240, 320, 3) uint8 for a film. `RenderingError` without OpenGL."""
        return self._picture(*VIDEO)

    def close(self) -> None:
        """Free the simulator and its OpenGL context."""
        self._env.close()

    def _picture(self, height: int, width: int) -> np.ndarray:
        try:
            return self._env.physics.render(height, width, camera_id=self._camera)
        except RuntimeError as error:
            raise RenderingError(f"no picture can be drawn ({error}): {HELP}") from error


def make(
    task: str,
    *,
    num_envs: int,
    seed: int,
    obs: str = "state",
    action_repeat: int | None = None,
    render: str = "default",
    workers: str = "sync",
    timeout: float = TIMEOUT,
    restarts: int = 3,
) -> CheckedVectorEnv:
    """`num_envs` copies of one task, "" for `cheetah-run`.

    `obs`: `state`, all of the task's observations as float32 (S), or `pixels`, three RGB frames of 84×84 from camera 0
    (quadruped: 2) as uint8 (9, 84, 84). `action_repeat`: None for the paper's (2 for tasks that it does not name).
    `render="fast"` has shadows of lower resolution and no antialiasing: several times faster, but other pictures, so
    results are not comparable. The other arguments are `difftori.envs.workers.launch`'s.

    Raises `ConfigError`, `MissingExtraError` (extra `dmc`), `RenderingError` (no OpenGL).
    """
    name = full_name(task)
    faults = numeric_faults(action_repeat=action_repeat)
    faults += choice_fault("obs", obs, OBSERVE) + choice_fault("render", render, ("default", "fast", "warp"))
    if render == "warp":
        faults.append(
            "render is 'warp': mujoco-warp needs a newer MuJoCo than the 3.3 that dm_control 1.0.28 is pinned to, so it is "
            "not supported; choose default or fast"
        )
    if faults:
        raise ConfigError(faults)
    repeat = action_repeat or ACTION_REPEAT.get(name, OTHER_REPEAT)
    build = partial(DmcEnv, name, obs=obs, action_repeat=repeat, render=render)
    return launch(
        build, name=f"dmc:{name}", num_envs=num_envs, seed=seed, workers=workers, timeout=timeout, restarts=restarts
    )


def _flat(observation: dict[str, np.ndarray]) -> np.ndarray:
    """All entries one after another, float32 (S)."""
    return np.concatenate([np.ravel(value) for value in observation.values()], dtype=np.float32, casting="same_kind")


def _suite(*, needs_pictures: bool) -> ModuleType:
    """dm_control's suite, drawing headless by EGL unless MUJOCO_GL says otherwise, or not at all where EGL is missing."""
    if importlib.util.find_spec("dm_control") is None:
        raise MissingExtraError("DeepMind Control needs the extra `dmc`: pip install 'difftori[dmc]'")
    return import_drawing("dm_control.suite", needs_pictures=needs_pictures)
