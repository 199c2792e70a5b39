"""What every environment module offers, and the checks that all of them share.

A module of this package is an environment when it has

    TASKS: tuple[str, ...]                                   names for `make`; the first one is the default
    make(task, *, num_envs, seed) -> gymnasium.vector.VectorEnv     "" stands for the default task

It may offer more, for instance a pure dynamics function. Heavy packages are imported inside `make`, which raises
`MissingExtraError` with the extra's name when they are absent. Conformance tests walk the package, so a new file is
tested without being asked.
"""

import numpy as np
from gymnasium.spaces import Box

from difftori.errors import ConfigError, NonFiniteError, ShapeError


def chosen_task(task: str, tasks: tuple[str, ...], *, env: str) -> str:
    """The name that `task` means: itself, or the first of `tasks` when it is empty. Else `ConfigError`."""
    if not task:
        return tasks[0]
    if task not in tasks:
        raise ConfigError([f"task {task!r} is unknown to environment {env!r}: choose one of {', '.join(tasks)}"])
    return task


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
