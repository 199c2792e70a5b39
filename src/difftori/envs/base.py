"""What all environments share: observation types, errors, metadata, and small checks of arguments."""

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.vector import VectorEnv

from difftori.errors import ConfigError, DifftoriError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from difftori.types import EnvSpec

Observation: TypeAlias = np.ndarray | dict[str, np.ndarray]
"""The observation of one environment, or batched over all of them: one array, or several named arrays."""

OBSERVE = ("state", "pixels")
"""`state`: flat float32 (S); `pixels`: uint8, channels first, the last frames stacked with the newest at the end."""
WORKERS = ("sync", "async")
"""`sync`: all copies in this process, one after another; `async`: one process each."""


class RenderingError(DifftoriError, RuntimeError):
    """No image can be drawn: the OpenGL libraries or the device are missing. The message names the packages."""


class WorkerError(DifftoriError, RuntimeError):
    """One copy of an environment raised, died or did not answer in time; `row` says which."""

    def __init__(self, message: str, *, row: int | None):
        self.row = row
        super().__init__(message)


class EnvironmentRestarted(DifftoriError, RuntimeError):
    """All copies were made anew because one failed: every partial episode is lost; reset all rows and go on.

    `restarts` counts them so far; `__cause__` is what failed.
    """

    def __init__(self, message: str, *, restarts: int):
        self.restarts = restarts
        super().__init__(message)


class EnvironmentFailed(DifftoriError, RuntimeError):
    """An environment failed more often than its budget of restarts allows; `__cause__` is the last failure."""


class ResetNeededError(DifftoriError, RuntimeError):
    """A step was asked of rows whose episode has ended or never begun."""


def env_spec(env: VectorEnv) -> "EnvSpec":
    """Read from the spaces, and from `metadata` as `episode_metadata` writes it. `ConfigError` for other spaces."""
    # Imported here because it brings torch, which the workers' processes do without: 0.2 GB and a second or two each.
    from difftori.types import EnvSpec

    observations, actions = env.single_observation_space, env.single_action_space
    if isinstance(observations, Dict):
        raise ConfigError(
            [
                f"{env.metadata.get('name', env)}: its observations are {', '.join(observations)}, by name, which is for "
                "imitation; an agent takes one array: choose another obs, such as state"
            ]
        )
    if not isinstance(observations, Box) or not isinstance(actions, Box) or len(actions.shape) != 1:
        raise ConfigError([f"spaces {observations} and {actions}: give Box observations and flat Box actions"])
    if len(observations.shape) == 3 and observations.shape[0] > observations.shape[2] <= 4:
        raise ConfigError([f"observations {observations}: images with the channels last; put the channels first"])
    return EnvSpec(
        name=str(env.metadata.get("name", type(env).__name__)),
        obs_shape=observations.shape,
        obs_dtype=str(observations.dtype),
        action_dim=actions.shape[0],
        max_episode_steps=env.metadata.get("max_episode_steps"),
        action_repeat=env.metadata.get("action_repeat", 1),
    )


def episode_metadata(
    name: str, *, max_episode_steps: int | None, action_repeat: int, fps: float = 30.0
) -> dict[str, Any]:
    """The `metadata` of a single environment from which `env_spec` reads; `fps` counts decisions per second."""
    return {
        "render_modes": ["rgb_array"],
        "render_fps": fps,
        "name": name,
        "max_episode_steps": max_episode_steps,
        "action_repeat": action_repeat,
    }


def chosen_task(task: str, tasks: tuple[str, ...], *, env: str) -> str:
    """The name that `task` means: itself, or the first of `tasks` when it is empty. Else `ConfigError`."""
    if not task:
        return tasks[0]
    if task not in tasks:
        near = difflib.get_close_matches(task, tasks, n=1, cutoff=0.5)
        meant = f"perhaps you meant {near[0]!r}; " if near else ""
        raise ConfigError([f"task {task!r} is unknown to environment {env!r}: {meant}choose one of {', '.join(tasks)}"])
    return task


def numeric_faults(**values: int | None) -> list[str]:
    """A fault for each value below 1; None passes."""
    return [f"{name} is {value}; give at least 1" for name, value in values.items() if value is not None and value < 1]


def choice_fault(name: str, value: str, known: Sequence[str]) -> list[str]:
    """A fault if `value` is not among the known ones."""
    return [] if value in known else [f"{name} is {value!r}; choose one of {', '.join(known)}"]


def clip_actions(actions: np.ndarray, box: Box, *, env: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    """What the environment executes, and which entries were cut to fit.

    `actions` and both results have the shape of `box`, the batched action space (num_envs, A). Raises `ShapeError` for
    another shape and `NonFiniteError` for NaN or Inf, with the environment, its rows and the step.
    """
    actions = np.asarray(actions, dtype=np.float64)
    if actions.shape != box.shape:
        raise ShapeError(f"{env}, step {step}: actions have shape {actions.shape}; give one row per copy, {box.shape}")
    broken = ~np.isfinite(actions)
    if broken.any():
        rows = np.flatnonzero(broken.reshape(len(actions), -1).any(axis=1)).tolist()
        raise NonFiniteError(
            f"{env}, step {step}: NaN or Inf in the actions of rows {rows[:8]}; look at the policy's output there"
        )
    executed = np.clip(actions, box.low, box.high)
    return executed, executed != actions


def stacked(rows: Sequence[Observation]) -> Observation:
    """The observations of all copies as one, with a leading dimension: (…) each to (num_envs, …)."""
    first = rows[0]
    if isinstance(first, dict):
        return {name: np.stack([row[name] for row in rows]) for name in first}  # pyright: ignore[reportArgumentType, reportCallIssue]
    return np.stack(rows)  # pyright: ignore[reportArgumentType, reportCallIssue]


def rescaled(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """`action` (A) from [−1, 1] to the task's own bounds, clipped to them against rounding."""
    return np.clip(low + (np.asarray(action, dtype=np.float64) + 1.0) * 0.5 * (high - low), low, high)


class FrameStack:
    """The last `count` frames as one image (count·C, height, width), the newest at the end."""

    def __init__(self, count: int):
        self.count = count
        self._frames: list[np.ndarray] = []

    def restart(self, frame: np.ndarray) -> np.ndarray:
        """An episode's first frame (height, width, C), which stands for those before it."""
        self._frames = [frame.transpose(2, 0, 1)] * self.count
        return np.concatenate(self._frames)

    def push(self, frame: np.ndarray) -> np.ndarray:
        """The next frame (height, width, C)."""
        self._frames = [*self._frames[1:], frame.transpose(2, 0, 1)]
        return np.concatenate(self._frames)
