"""Conversions of an environment's spaces to those that the library uses. An environment with such spaces is unchanged."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import TransformAction, TransformObservation

from difftori.envs.base import rescaled
from difftori.errors import ConfigError


def unit_actions(env: gymnasium.Env, *, name: str) -> gymnasium.Env:
    """Wrap `env` to take float32 actions (A) in [−1, 1], mapped linearly to its bounds. Raises `ConfigError` without bounds."""
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
        return rescaled(action, low, high).reshape(space.shape).astype(space.dtype)

    return TransformAction(env, to_own, unit)


def float32_observations(env: gymnasium.Env, *, name: str) -> gymnasium.Env:
    """Wrap `env` to return floating-point observations as float32. Raises `ConfigError` unless they are a Box or Dict of Boxes."""
    space = env.observation_space
    parts = space.spaces if isinstance(space, Dict) else {"": space}
    boxes: dict[str, Any] = {key: _float32(part) for key, part in parts.items() if isinstance(part, Box)}
    if len(boxes) < len(parts):
        raise ConfigError(
            [
                f"{name}: its observations are {space}. Fix: flatten them to a Box (FlattenObservation) or to a Dict of Boxes"
            ]
        )
    if all(boxes[key] is part for key, part in parts.items()):
        return env

    def convert(observation: Any) -> Any:
        if isinstance(space, Dict):
            return {key: np.asarray(observation[key], dtype=box.dtype) for key, box in boxes.items()}
        return np.asarray(observation, dtype=np.float32)

    return TransformObservation(env, convert, Dict(boxes) if isinstance(space, Dict) else boxes[""])


def _float32(box: Box) -> Box:
    """Return the box in float32, or `box` itself if its dtype is float32 or an integer type."""
    if not np.issubdtype(box.dtype, np.floating) or box.dtype == np.float32:
        return box
    # float64 bounds that exceed float32 become infinite, which is their meaning.
    with np.errstate(over="ignore"):
        return Box(box.low.astype(np.float32), box.high.astype(np.float32), dtype=np.float32)
