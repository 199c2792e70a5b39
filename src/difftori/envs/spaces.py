"""Converts an environment to the observations and actions that the library uses, and checks what it returns at every step."""

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import FlattenObservation, TimeLimit, TransformAction

from difftori.envs.base import Observation, rescaled
from difftori.errors import ConfigError, NonFiniteError, ShapeError

SUCCESS = ("success", "is_success")
"""Names of the success in an environment's info; the first that exists is used."""
_CHANNELS = (1, 3, 4)


def unit_actions(env: gymnasium.Env, *, name: str) -> gymnasium.Env:
    """Wrap `env` to take float32 actions (A) in [−1, 1], mapped linearly to its bounds. Raises `ConfigError` without bounds.

    The bounds are kept in `metadata["action_bounds"]`.
    """
    space = env.action_space
    if not isinstance(space, Box) or not space.shape or 0 in space.shape:
        raise ConfigError([f"{name}: its actions are {space}. Fix: use a Box with at least one number"])
    if not space.is_bounded():
        raise ConfigError([f"{name}: its actions {space} have no bounds to map ±1 to. Fix: bound them with a wrapper"])
    unit = Box(-1.0, 1.0, (int(np.prod(space.shape)),), np.float32)
    if space == unit:
        return env
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()

    def to_own(action: np.ndarray) -> np.ndarray:
        own = rescaled(action, low, high).reshape(space.shape)
        return (np.rint(own) if np.issubdtype(space.dtype, np.integer) else own).astype(space.dtype)

    wrapped = TransformAction(env, to_own, unit)
    wrapped.metadata = {**env.metadata, "action_bounds": (tuple(low.tolist()), tuple(high.tolist()))}
    return wrapped


def flat_observations(env: gymnasium.Env, *, name: str) -> gymnasium.Env:
    """Wrap `env` to return the arrays of a Dict observation as one vector, in the order of the space. Others are unchanged.

    Names and shapes of the arrays are kept in `metadata["flattened"]`, if all of them are boxes.
    """
    space = env.observation_space
    if not isinstance(space, Dict):
        return env
    if images := [key for key, part in space.spaces.items() if isinstance(part, Box) and len(part.shape) > 2]:
        raise ConfigError(
            [f"--flatten-obs: {', '.join(images)} of {name} are images. Fix: remove them from the observations"]
        )
    wrapped = FlattenObservation(env)
    if all(isinstance(part, Box) for part in space.spaces.values()):
        wrapped.metadata = {**env.metadata, "flattened": tuple((key, part.shape) for key, part in space.spaces.items())}
    return wrapped


class ActionRepeat(gymnasium.Wrapper):
    """Executes each action for `count` steps, or until the episode ends. Rewards are summed; success is success at any of them."""

    def __init__(self, env: gymnasium.Env, count: int):
        super().__init__(env)
        self._count = count
        repeat = count * env.metadata.get("action_repeat", 1)
        self.metadata = {
            **env.metadata,
            "action_repeat": repeat,
            "render_fps": env.metadata.get("render_fps", 30) / count,
        }

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one agent step."""
        total, succeeded = 0.0, False
        for _ in range(self._count):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            succeeded = succeeded or bool(info.get("success", False))
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, {**info, "success": True} if succeeded else info


def _own_limit(env: gymnasium.Env) -> int | None:
    """Return the number of steps after which an environment truncates its episodes, as far as it declares it."""
    declared = env.metadata.get("max_episode_steps") or (env.spec.max_episode_steps if env.spec else None)
    while declared is None and isinstance(env, gymnasium.Wrapper):
        declared = env._max_episode_steps if isinstance(env, TimeLimit) else None  # noqa: SLF001 (there is no public name)
        env = env.env
    return declared


class CheckedEnv(gymnasium.Wrapper):
    """One environment in the library's conventions: numbers float32, images uint8 with channels first.

    Accepted are Box observations and Dicts of them: numbers of any type; images with channels first or last, uint8 or
    floating-point in [0, 1] or [0, 255]; depth images of one floating-point channel, which become float32 (height width 1).
    Rewards and flags may be arrays of one number. Of `info`, only the numbers are kept, and `success` (or `is_success`) as a
    bool. `max_episode_steps`: the episode is truncated after this number of agent steps; None: no limit of ours.

    Raises `ConfigError` for other spaces; `reset` and `step` raise `ShapeError` for an observation, reward or flag of another
    shape or type than the space says, and `NonFiniteError` for NaN or Inf in an image.
    """

    def __init__(self, env: gymnasium.Env, *, name: str, max_episode_steps: int | None = None):
        super().__init__(env)
        space = env.observation_space
        parts = space.spaces if isinstance(space, Dict) else {"": space}
        if not all(isinstance(part, Box) for part in parts.values()):
            raise ConfigError(
                [
                    f"{name}: its observations are {space}. Fix: flatten them to a Box (FlattenObservation) or to a Dict of Boxes"
                ]
            )
        self._entries = {key: _Entry.of(part) for key, part in parts.items() if isinstance(part, Box)}
        spaces: dict[str, Any] = {key: entry.space for key, entry in self._entries.items()}
        self.observation_space = Dict(spaces) if isinstance(space, Dict) else spaces[""]
        self._name, self._limit, self._steps = name, max_episode_steps, 0
        if max_episode_steps is not None:
            repeat = env.metadata.get("action_repeat", 1)
            own = _own_limit(env)
            limit = max_episode_steps * repeat
            self.metadata = {**env.metadata, "max_episode_steps": limit if own is None else min(limit, own)}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        return self._converted(observation), _numbers(info)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one agent step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        over = self._limit is not None and self._steps >= self._limit
        return (
            self._converted(observation),
            float(self._single("reward", reward)),
            bool(self._single("terminated", terminated)),
            bool(self._single("truncated", truncated)) or over,
            _numbers(info),
        )

    def _converted(self, observation: Any) -> Observation:
        place = f"{self._name}, step {self._steps}"
        if "" in self._entries:
            return self._entries[""].converted(observation, f"{place}: the observation")
        if not isinstance(observation, dict) or self._entries.keys() - observation.keys():
            found = ", ".join(observation) if isinstance(observation, dict) else f"a {type(observation).__name__}"
            raise ShapeError(
                f"{place}: the observation has {found}, but its space has {', '.join(self._entries)}. Fix: return them all"
            )
        return {
            key: self._entries[key].converted(values, f"{place}: the observation {key!r}")
            for key, values in observation.items()
            if key in self._entries
        }

    def _single(self, what: str, value: Any) -> Any:
        array = np.asarray(value)
        if array.size != 1:
            raise ShapeError(
                f"{self._name}, step {self._steps}: the {what} has shape {array.shape}. Fix: return one number"
            )
        return array.item()


@dataclass(frozen=True)
class _Entry:
    """One array of the observations: the environment's own Box, and the converted one.

    `scale`: factor from floating-point images to [0, 255], None for other arrays. `axes`: permutation of the axes of images whose
    channels are in the other place, None for other arrays.
    """

    own: Box
    space: Box
    scale: float | None = None
    axes: tuple[int, int, int] | None = None

    @staticmethod
    def of(own: Box) -> "_Entry":
        """Decide what the array is: an image of bytes, a depth image, or numbers."""
        floating = np.issubdtype(own.dtype, np.floating)
        if len(own.shape) != 3 or not (floating or own.dtype == np.uint8):
            return _Entry(own, own if own.dtype == np.uint8 and len(own.shape) > 1 else _float32(own))
        last = own.shape[2] in _CHANNELS and own.shape[0] not in _CHANNELS
        if floating and 1 in (own.shape[0], own.shape[2]):  # depth: float32 (height width 1)
            axes = None if own.shape[2] == 1 else (1, 2, 0)
            return _Entry(own, _permuted(_float32(own), axes), axes=axes)
        top = float(own.high.max())
        if floating and not (own.low.min() >= 0 and top in (1.0, 255.0)):
            return _Entry(own, _float32(own))
        axes = (2, 0, 1) if last else None
        shape = own.shape if axes is None else tuple(own.shape[axis] for axis in axes)
        return _Entry(own, Box(0, 255, shape, np.uint8), 255.0 / top if floating else None, axes)

    def converted(self, values: Any, what: str) -> np.ndarray:
        """Convert one observation. Raises `ShapeError` for another shape or type, and `NonFiniteError`."""
        array = np.asarray(values)
        if array.shape != self.own.shape:
            raise ShapeError(
                f"{what} has shape {array.shape}, but its space has {self.own.shape}. Fix: return the declared shape"
            )
        if array.dtype == object or np.issubdtype(array.dtype, np.complexfloating):
            raise ShapeError(f"{what} has type {array.dtype}. Fix: return {self.own.dtype}")
        if self.own.dtype == np.uint8 and array.dtype != np.uint8:
            raise ShapeError(f"{what} has type {array.dtype}, but its space has uint8. Fix: return uint8")
        if self.scale is not None:
            array = _bytes(array, self.scale, what)
        if self.axes is not None:
            array = array.transpose(self.axes)
        # float64 numbers that exceed float32 become infinite, which the vector environment reports
        with np.errstate(over="ignore"):
            return array.astype(self.space.dtype, copy=False)


def _bytes(image: np.ndarray, scale: float, what: str) -> np.ndarray:
    """Convert a floating-point image to uint8. Raises an error for numbers outside the declared range."""
    if not np.isfinite(image).all():
        raise NonFiniteError(f"{what}, an image, has NaN or Inf. Fix: check the environment's rendering")
    scaled = image * scale
    if scaled.min() < -0.5 or scaled.max() > 255.5:
        raise ShapeError(
            f"{what}, an image, has numbers from {image.min():g} to {image.max():g}, but its space is bounded by 0 and "
            f"{255 / scale:g}. Fix: return the declared range"
        )
    return np.rint(scaled).astype(np.uint8)


def _numbers(info: dict[str, Any]) -> dict[str, Any]:
    """Keep the numbers of `info`, and the success under one name. Arrays of changing length could not be batched."""
    kept = {key: value for key, value in info.items() if isinstance(value, (bool, int, float, np.number, np.bool_))}
    for name in (*reversed(SUCCESS), "score"):
        value = np.asarray(info[name]) if name in info else None
        if value is not None and value.size == 1:
            kept["success" if name in SUCCESS else name] = value.item()
    return kept


def _permuted(box: Box, axes: tuple[int, int, int] | None) -> Box:
    return box if axes is None else Box(box.low.transpose(axes), box.high.transpose(axes), dtype=np.float32)


def _float32(box: Box) -> Box:
    """Return the box in float32, or `box` itself if that is its type."""
    if box.dtype == np.float32:
        return box
    # float64 bounds that exceed float32 become infinite, which is their meaning.
    with np.errstate(over="ignore"):
        return Box(box.low.astype(np.float32), box.high.astype(np.float32), dtype=np.float32)
