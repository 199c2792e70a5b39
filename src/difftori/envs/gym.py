"""Environments of Gymnasium's registry with bounded Box actions, by id, such as `gym:Pendulum-v1`."""

import importlib
import inspect
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box

from difftori.envs.base import OBS_TYPES, FrameStack, RenderingError, choice_fault, episode_metadata, numeric_faults
from difftori.envs.family import EnvFamily
from difftori.envs.spaces import ActionRepeat
from difftori.errors import ConfigError, MissingExtraError

TASKS = ("Pendulum-v1", "MountainCarContinuous-v0")
"""Tasks that need no other packages than Gymnasium. Any other id of its registry can be used too."""
FRAMES = 3


class GymEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A registered environment with flat float32 observations or stacked images.

    `task`: the id; `my_module:Id-v0` imports the module that registers it. `obs`: `state` for Box observations, flattened
    to float32 (S), or `pixels` for image observations (height, width, C) uint8, the last three stacked with channels first;
    default: `state`. `action_repeat`: steps per action; default: 1.

    Raises `ConfigError` for an unknown id and for other observation spaces, and `MissingExtraError` if the environment
    needs a package that is not installed.
    """

    def __init__(self, task: str, *, obs: str = "state", action_repeat: int | None = None):
        if faults := numeric_faults(action_repeat=action_repeat) + choice_fault("obs", obs, OBS_TYPES):
            raise ConfigError(faults)
        self._env = _registered(task)
        limit = self._env.spec.max_episode_steps if self._env.spec else None
        repeat = action_repeat or 1
        if repeat > 1:  # inside the stack of frames, which has those of agent steps only
            self._env = ActionRepeat(self._env, repeat)
        observations = self._env.observation_space
        if fault := _observation_fault(observations, obs):
            self._env.close()
            raise ConfigError([f"gym:{task}: {fault}"])
        assert isinstance(observations, Box)
        self.action_space = self._env.action_space
        if obs == "pixels":
            height, width, channels = observations.shape
            self._frames = FrameStack(FRAMES)
            self.observation_space = Box(0, 255, (channels * FRAMES, height, width), np.uint8)
        else:
            self._frames = None
            # float64 bounds that exceed float32 become infinite, which is their meaning.
            with np.errstate(over="ignore"):
                low, high = (bound.astype(np.float32).ravel() for bound in (observations.low, observations.high))
            self.observation_space = Box(low, high, dtype=np.float32)
        self.render_mode = self._env.render_mode
        fps = float(self._env.metadata.get("render_fps", 30))
        self.metadata = episode_metadata(f"gym:{task}", max_episode_steps=limit, action_repeat=repeat, fps=fps)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a new episode. Seed and options are passed to the wrapped environment."""
        super().reset(seed=seed)
        observation, info = self._env.reset(seed=seed, options=options)
        if self._frames is None:
            return self._flat(observation), info
        return self._frames.restart(np.asarray(observation)), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one agent step, `action_repeat` steps of the environment."""
        observation, reward, terminated, truncated, info = self._env.step(action)
        obs = self._flat(observation) if self._frames is None else self._frames.push(np.asarray(observation))
        return obs, float(reward), bool(terminated), bool(truncated), info

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the environment's RGB frame. Raises `RenderingError` if it renders none, or a package is missing."""
        if self.render_mode != "rgb_array":
            raise RenderingError(
                f"{self.metadata['name']} renders no frames, because it has no render mode rgb_array. Fix: omit the video"
            )
        try:
            frame = self._env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise RenderingError(f"{self.metadata['name']} cannot render: {error}") from error
        return np.asarray(frame)

    def close(self) -> None:
        """Close the wrapped environment."""
        self._env.close()

    def _flat(self, observation: Any) -> np.ndarray:
        return np.asarray(observation, dtype=np.float32).ravel()


def full_name(task: str) -> str:
    """Return the id `task`, or the first of `TASKS` if it is "". Any id of the registry is a task."""
    return task or TASKS[0]


FAMILY = EnvFamily(build=GymEnv, tasks=TASKS, full_name=full_name)


def _registered(identifier: str) -> gymnasium.Env:
    """Create the environment of an id, with rendering if supported. `module:Id-v0` imports the module that registers it."""
    module, _, name = identifier.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        entry = gymnasium.spec(name).entry_point
        kind = load_env_creator(entry) if isinstance(entry, str) else entry
        modes = (
            kind.metadata.get("render_modes", []) if inspect.isclass(kind) and issubclass(kind, gymnasium.Env) else []
        )
        # Gymnasium's checker only warns; CheckedVectorEnv raises errors.
        if "rgb_array" in modes:
            return gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True)
        return gymnasium.make(name, disable_env_checker=True)
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingExtraError(f"gym:{identifier} needs another package: {error}") from error
    except ModuleNotFoundError as error:
        if module and module.startswith(error.name or ""):
            raise ConfigError(
                [f"gym:{identifier}: there is no module {error.name!r}. Fix: add its folder to sys.path"]
            ) from error
        raise MissingExtraError(
            f"gym:{identifier} needs the package {error.name!r}. Fix: install it; Gymnasium's extras are gymnasium[mujoco], "
            "gymnasium[box2d] and gymnasium[classic-control]"
        ) from error
    except gymnasium.error.Error as error:
        raise ConfigError(
            [f"gym:{identifier}: {error} Available without other packages: {', '.join(TASKS)}"]
        ) from error


def _observation_fault(observations: gymnasium.Space, obs: str) -> str | None:
    """Return an error message if these observations do not match the option `obs`, else None."""
    if not isinstance(observations, Box):
        return f"its observations are {observations}. Fix: flatten them to a Box, for example with FlattenObservation"
    if (observations.dtype == np.uint8 and len(observations.shape) == 3) != (obs == "pixels"):
        fitting = "state" if obs == "pixels" else "pixels"
        return f"its observations are {observations}, which obs='{obs}' does not support. Fix: obs='{fitting}'"
    return None
