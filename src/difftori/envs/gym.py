"""Any environment of Gymnasium's registry whose actions fill a bounded box, by its id, as in `gym:Pendulum-v1`."""

import importlib
import inspect
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box

from difftori.envs.base import OBSERVE, FrameStack, RenderingError, choice_fault, episode_metadata, numeric_faults
from difftori.envs.family import EnvFamily
from difftori.errors import ConfigError, MissingExtraError

TASKS = ("Pendulum-v1", "MountainCarContinuous-v0")
"""Those that need nothing but Gymnasium. Any other id of its registry is as good."""
FRAMES = 3


class GymEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One registered environment with flat float32 observations, or stacked images.

    `task`: its id; `my_module:Id-v0` imports the module that registers it. `obs`: `state` for Box observations, flattened
    to float32 (S), or `pixels` for those that are images themselves (height, width, C) uint8, the last three stacked,
    channels first. `action_repeat`: steps per action, default: 1.

    Raises `ConfigError` for an unknown id and for observations of another kind, and `MissingExtraError` where the
    environment needs a package that is not installed.
    """

    def __init__(self, task: str, *, obs: str = "state", action_repeat: int | None = None):
        if faults := numeric_faults(action_repeat=action_repeat) + choice_fault("obs", obs, OBSERVE):
            raise ConfigError(faults)
        self._env = _registered(task)
        observations = self._env.observation_space
        if fault := _observation_fault(observations, obs):
            self._env.close()
            raise ConfigError([f"gym:{task}: {fault}"])
        assert isinstance(observations, Box)
        self._repeat = action_repeat or 1
        self.action_space = self._env.action_space
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
        fps = self._env.metadata.get("render_fps", 30) / self._repeat
        self.metadata = episode_metadata(f"gym:{task}", max_episode_steps=limit, action_repeat=self._repeat, fps=fps)

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
        """Take the action `action_repeat` times, or until the episode ends; rewards are summed."""
        total = 0.0
        for _ in range(self._repeat):
            observation, reward, terminated, truncated, info = self._env.step(action)
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


def full_name(task: str) -> str:
    """The id `task`; "" is the first of `TASKS`. Any id of the registry is a task."""
    return task or TASKS[0]


FAMILY = EnvFamily(build=GymEnv, tasks=TASKS, full_name=full_name)


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


def _observation_fault(observations: gymnasium.Space, obs: str) -> str | None:
    """Why these observations do not fit the option `obs`."""
    if not isinstance(observations, Box):
        return f"its observations are {observations}; flatten them to a Box, as FlattenObservation does"
    if (observations.dtype == np.uint8 and len(observations.shape) == 3) != (obs == "pixels"):
        return f"its observations are {observations}; obs='{obs}' does not fit them, the other choice does"
    return None
