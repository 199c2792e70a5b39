"""Shared by all environments: observation types, errors, metadata, and checks of arguments."""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.vector import VectorEnv

from difftori.errors import ConfigError, DifftoriError, MissingExtraError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from difftori.types import EnvSpec

Observation: TypeAlias = np.ndarray | dict[str, np.ndarray]
"""The observation of one environment, or batched over all of them: one array, or several named arrays."""

OBS_TYPES = ("state", "pixels")
"""`state`: flat float32 (S); `pixels`: uint8, channels first, the last frames stacked, newest last."""
WORKERS = ("sync", "async")
"""`sync`: all copies in this process, one after another; `async`: one process per copy."""


class RenderingError(DifftoriError, RuntimeError):
    """Images cannot be rendered, because the OpenGL libraries or the device are missing. The message names the packages."""


UNRECOVERABLE = (ConfigError, MissingExtraError, RenderingError, ShapeError, NonFiniteError)
"""Errors that another start of the environment would repeat, so it is not restarted after them."""


class WorkerError(DifftoriError, RuntimeError):
    """A copy of an environment raised an exception, crashed or timed out. `row` is its row."""

    def __init__(self, message: str, *, row: int | None):
        self.row = row
        super().__init__(message)


class EnvironmentRestarted(DifftoriError, RuntimeError):
    """All copies were restarted because one failed. Unfinished episodes are lost; reset all rows to continue.

    `restarts` is the number of restarts so far. `__cause__` is the failure.
    """

    def __init__(self, message: str, *, restarts: int):
        self.restarts = restarts
        super().__init__(message)


class EnvironmentFailed(DifftoriError, RuntimeError):
    """An environment failed more often than its limit of restarts. `__cause__` is the last failure."""


class ResetNeededError(DifftoriError, RuntimeError):
    """`step` was called for rows whose episode has ended or has not begun."""


def env_spec(env: VectorEnv) -> "EnvSpec":
    """Create the `EnvSpec` of an environment from its spaces and `episode_metadata`. Raises `ConfigError` for other spaces."""
    # Imported here because it imports torch, which worker processes do not need: 0.2 GB and one or two seconds each.
    from difftori.types import EnvSpec

    observations, actions = env.single_observation_space, env.single_action_space
    if isinstance(observations, Dict):
        raise ConfigError(
            [
                f"{env.metadata.get('name', env)}: its observations are the dictionary {', '.join(observations)}, which is for "
                "imitation; an agent takes one array. Fix: choose another obs, such as state, or make one vector of them, --flatten-obs"
            ]
        )
    if not isinstance(observations, Box) or not isinstance(actions, Box) or len(actions.shape) != 1:
        raise ConfigError(
            [f"spaces {observations} and {actions} are not supported. Fix: use Box observations and flat Box actions"]
        )
    if len(observations.shape) not in (1, 3) or (len(observations.shape) == 1 and observations.dtype == np.uint8):
        raise ConfigError(
            [
                f"observations {observations} are neither a vector of float32 nor an image. Fix: flatten them "
                "(gymnasium.wrappers.FlattenObservation), and convert them to float32"
            ]
        )
    if len(observations.shape) == 3 and observations.dtype != np.uint8:
        raise ConfigError(
            [
                f"observations {observations} are neither a vector nor an image. Fix: bound images by 0 and 255 (uint8) or 1 "
                "(floating-point)"
            ]
        )
    if len(observations.shape) == 3 and observations.shape[0] > observations.shape[2] <= 4:
        raise ConfigError(
            [
                f"observations {observations} are images with the channels last. Fix: put the channels first, or return a single "
                "environment, whose images are converted"
            ]
        )
    return EnvSpec(
        name=str(env.metadata.get("name", type(env).__name__)),
        obs_shape=observations.shape,
        obs_dtype=str(observations.dtype),
        action_dim=actions.shape[0],
        max_episode_steps=env.metadata.get("max_episode_steps"),
        action_repeat=env.metadata.get("action_repeat", 1),
        action_bounds=env.metadata.get("action_bounds"),
        flattened=env.metadata.get("flattened"),
    )


def episode_metadata(
    name: str, *, max_episode_steps: int | None, action_repeat: int, fps: float = 30.0
) -> dict[str, Any]:
    """Return the `metadata` of a single environment, for `env_spec`. `fps` is the number of agent steps per second."""
    return {
        "render_modes": ["rgb_array"],
        "render_fps": fps,
        "name": name,
        "max_episode_steps": max_episode_steps,
        "action_repeat": action_repeat,
    }


def chosen_task(task: str, tasks: tuple[str, ...], *, env: str) -> str:
    """Return `task`, or the first of `tasks` if it is "". Raises `ConfigError` if it is not in `tasks`."""
    if not task:
        return tasks[0]
    if task not in tasks:
        near = difflib.get_close_matches(task, tasks, n=1, cutoff=0.5)
        meant = f"; perhaps you meant {near[0]!r}" if near else ""
        raise ConfigError(
            [f"task {task!r} is unknown in environment {env!r}{meant}. Fix: choose one of {', '.join(tasks)}"]
        )
    return task


def numeric_faults(**values: object) -> list[str]:
    """Return an error message for each value that is not an integer of at least 1. None is valid."""
    faults = []
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer | None):
            faults.append(f"{name} is {value!r}, not an integer")
        elif value is not None and value < 1:
            faults.append(f"{name} is {value}; it must be at least 1")
    return faults


def choice_fault(name: str, value: str, known: Sequence[str]) -> list[str]:
    """Return an error message if `value` is not one of `known`."""
    return [] if value in known else [f"{name} is {value!r}. Fix: choose one of {', '.join(known)}"]


def refuse_options(options: Mapping[str, Any] | None, *, env: str, known: Sequence[str] = ()) -> None:
    """Raise `ConfigError` if `options` of a reset contain names that are not in `known`."""
    unknown = sorted(set(options or ()) - set(known))
    if not unknown:
        return
    if not known:
        raise ConfigError(
            [f"{env}: reset options {unknown} are unknown; this environment takes none. Fix: remove them"]
        )
    names = f"the only option is {known[0]}" if len(known) == 1 else f"the options are {' and '.join(known)}"
    raise ConfigError([f"{env}: reset options {unknown} are unknown. Fix: remove them; {names}"])


def as_numbers(value: object) -> np.ndarray:
    """Return a value as an array of float64, or an empty one if it is none, whose shape the caller refuses."""
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return np.empty(0)


def clip_actions(actions: np.ndarray, box: Box, *, env: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Clip actions to `box`. Return the clipped actions, and a mask of the entries that were clipped.

    `actions` and both results have the shape of `box`, the batched action space (num_envs, A). Raises `ShapeError` for
    a different shape, and `NonFiniteError` for NaN or Inf, with the environment, its rows and the step.
    """
    actions = np.asarray(actions, dtype=np.float64)
    if actions.shape != box.shape:
        raise ShapeError(
            f"{env}, step {step}: actions have shape {actions.shape}. Fix: pass one row per copy, {box.shape}"
        )
    broken = ~np.isfinite(actions)
    if broken.any():
        rows = np.flatnonzero(broken.reshape(len(actions), -1).any(axis=1)).tolist()
        raise NonFiniteError(
            f"{env}, step {step}: NaN or Inf in the actions of rows {rows[:8]}. Fix: check the policy's output there"
        )
    executed = np.clip(actions, box.low, box.high)
    return executed, executed != actions


def stacked(rows: Sequence[Observation]) -> Observation:
    """Stack the observations (…) of all copies to one observation (num_envs, …)."""
    first = rows[0]
    if isinstance(first, dict):
        return {name: np.stack([row[name] for row in rows]) for name in first}  # pyright: ignore[reportArgumentType, reportCallIssue]
    return np.stack(rows)  # pyright: ignore[reportArgumentType, reportCallIssue]


def rescaled(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map `action` (A) from [−1, 1] to the task's own bounds, clipped because of rounding."""
    return np.clip(low + (np.asarray(action, dtype=np.float64) + 1.0) * 0.5 * (high - low), low, high)


class FrameStack:
    """Stacks the last `count` frames to one image (count·C, height, width), newest last."""

    def __init__(self, count: int):
        self.count = count
        self._frames: list[np.ndarray] = []

    def restart(self, frame: np.ndarray) -> np.ndarray:
        """Begin an episode with its first frame (height, width, C), repeated `count` times. Return the stacked image."""
        self._frames = [frame.transpose(2, 0, 1)] * self.count
        return np.concatenate(self._frames)

    def push(self, frame: np.ndarray) -> np.ndarray:
        """Append the next frame (height, width, C). Return the stacked image."""
        self._frames = [*self._frames[1:], frame.transpose(2, 0, 1)]
        return np.concatenate(self._frames)
