"""Any environment of Gymnasium's registry whose actions fill a bounded box, by its id, as in `gym:Pendulum-v1`."""

import importlib
import inspect
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box

from difftori.envs.base import (
    OBSERVE,
    FrameStack,
    RenderingError,
    choice_fault,
    episode_metadata,
    numeric_faults,
    rescaled,
)
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.workers import TIMEOUT, launch
from difftori.errors import ConfigError, MissingExtraError

TASKS = ("Pendulum-v1", "MountainCarContinuous-v0")
"""Those that need nothing but Gymnasium. Any other id of its registry is as good."""
FRAMES = 3


class GymEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One registered environment with actions in [−1, 1]^A and flat float32 or stacked picture observations."""

    def __init__(self, identifier: str, *, obs: str, action_repeat: int):
        self._env = _registered(identifier)
        faults = _space_faults(self._env, obs)
        if faults:
            self._env.close()
            raise ConfigError([f"gym:{identifier}: {fault}" for fault in faults])
        observations, actions = self._env.observation_space, self._env.action_space
        assert isinstance(observations, Box)
        assert isinstance(actions, Box)
        self._repeat = action_repeat
        self._low, self._high = (bound.astype(np.float64).ravel() for bound in (actions.low, actions.high))
        self._action_shape, self._action_dtype = actions.shape, actions.dtype
        self.action_space = Box(-1.0, 1.0, (self._low.size,), np.float32)
        if obs == "pixels":
            height, width, channels = observations.shape
            self._frames = FrameStack(FRAMES)
            self.observation_space = Box(0, 255, (channels * FRAMES, height, width), np.uint8)
        else:
            self._frames = None
            # Bounds of float64 that float32 cannot hold become infinite, which is what they mean.
            with np.errstate(over="ignore"):
                low, high = (bound.astype(np.float32).ravel() for bound in (observations.low, observations.high))
            self.observation_space = Box(low, high, dtype=np.float32)
        self.render_mode = self._env.render_mode
        limit = self._env.spec.max_episode_steps if self._env.spec else None
        fps = self._env.metadata.get("render_fps", 30) / action_repeat
        self.metadata = episode_metadata(
            f"gym:{identifier}", max_episode_steps=limit, action_repeat=action_repeat, fps=fps
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode; seed and options go to the environment inside."""
        super().reset(seed=seed)
        observation, info = self._env.reset(seed=seed, options=options)
        if self._frames is None:
            return self._flat(observation), info
        return self._frames.restart(np.asarray(observation)), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take the action (A) `action_repeat` times, or until the episode ends; rewards are summed."""
        executed = rescaled(action, self._low, self._high).reshape(self._action_shape).astype(self._action_dtype)
        total = 0.0
        for _ in range(self._repeat):
            observation, reward, terminated, truncated, info = self._env.step(executed)
            total += float(reward)
            if terminated or truncated:
                break
        seen = self._flat(observation) if self._frames is None else self._frames.push(np.asarray(observation))
        return seen, total, bool(terminated), bool(truncated), info

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The environment's own RGB frame. `RenderingError` if it has none, or lacks a package to draw it."""
        if self.render_mode != "rgb_array":
            raise RenderingError(f"{self.metadata['name']} draws no frames: it has no render mode rgb_array")
        try:
            frame = self._env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise RenderingError(f"{self.metadata['name']} cannot draw: {error}") from error
        return np.asarray(frame)

    def close(self) -> None:
        """Close the environment inside."""
        self._env.close()

    def _flat(self, observation: Any) -> np.ndarray:
        return np.asarray(observation, dtype=np.float32).ravel()


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
    """`num_envs` copies of the environment registered as `task`, "" for `Pendulum-v1`.

    `obs`: `state` for Box observations, flattened to float32 (S); `pixels` for those that are pictures themselves
    (height, width, C) uint8, the last three stacked, channels first. `action_repeat`: None is 1. `render` must be
    `default`. The other arguments are `difftori.envs.workers.launch`'s.

    Raises `ConfigError`: unknown id, discrete or unbounded actions, dictionary observations; `MissingExtraError` where
    the environment needs a package that is not installed.
    """
    identifier = task or TASKS[0]
    faults = numeric_faults(action_repeat=action_repeat) + choice_fault("obs", obs, OBSERVE)
    faults += choice_fault("render", render, ("default",))
    if faults:
        raise ConfigError(faults)
    build = partial(GymEnv, identifier, obs=obs, action_repeat=action_repeat or 1)
    return launch(
        build,
        name=f"gym:{identifier}",
        num_envs=num_envs,
        seed=seed,
        workers=workers,
        timeout=timeout,
        restarts=restarts,
    )


def _registered(identifier: str) -> gymnasium.Env:
    """The environment of that id, ready to draw if it can; `module:Id-v0` imports the module that registers it."""
    module, _, name = identifier.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        entry = gymnasium.spec(name).entry_point
        kind = load_env_creator(entry) if isinstance(entry, str) else entry
        modes = (
            kind.metadata.get("render_modes", []) if inspect.isclass(kind) and issubclass(kind, gymnasium.Env) else []
        )
        # Gymnasium's own checker only warns; CheckedVectorEnv refuses.
        if "rgb_array" in modes:
            return gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True)
        return gymnasium.make(name, disable_env_checker=True)
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingExtraError(f"gym:{identifier} needs a package of its own: {error}") from error
    except ModuleNotFoundError as error:
        if module and module.startswith(error.name or ""):
            raise ConfigError(
                [f"gym:{identifier}: there is no module {error.name!r}; is its folder on sys.path?"]
            ) from error
        raise MissingExtraError(
            f"gym:{identifier} needs the package {error.name!r}; Gymnasium's own extras are gymnasium[mujoco], "
            "gymnasium[box2d] and gymnasium[classic-control]"
        ) from error
    except gymnasium.error.Error as error:
        raise ConfigError([f"gym:{identifier}: {error} Known without further packages: {', '.join(TASKS)}"]) from error


def _space_faults(env: gymnasium.Env, obs: str) -> list[str]:
    """What keeps this environment from being learnt by continuous control."""
    actions, observations = env.action_space, env.observation_space
    faults = []
    if not isinstance(actions, Box) or not actions.shape or 0 in actions.shape:
        faults.append(f"its actions are {actions}; only a Box of at least one number can be planned")
    elif not actions.is_bounded():
        faults.append(
            f"its actions {actions} have no bounds that ±1 could stand for; bound them by a wrapper of your own"
        )
    if not isinstance(observations, Box):
        faults.append(f"its observations are {observations}; flatten them to a Box, as FlattenObservation does")
    elif (observations.dtype == np.uint8 and len(observations.shape) == 3) != (obs == "pixels"):
        faults.append(f"its observations are {observations}; obs='{obs}' does not fit them, the other choice does")
    return faults
