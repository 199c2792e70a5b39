"""Films of episodes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gymnasium.vector import VectorEnv

from difftori.envs.base import RenderingError
from difftori.errors import ConfigError


@dataclass(frozen=True)
class Recording:
    """One filmed episode: `frames` (T+1 height width 3) uint8, `rewards` (T), frames per second."""

    frames: np.ndarray
    rewards: np.ndarray
    fps: float


def record(
    env: VectorEnv, act: Callable[[np.ndarray], np.ndarray], *, seed: int, max_decisions: int = 10_000
) -> Recording:
    """Film the episode of that seed. `env` has one copy; `act` maps observations (1, …) to actions (1, A).

    Raises `RenderingError` where the environment draws no frames, and `ConfigError` for more copies than one.
    """
    if env.num_envs != 1:
        raise ConfigError([f"{env.num_envs} copies of the environment cannot be filmed; make it with num_envs=1"])
    observations, _ = env.reset(seed=[seed])  # pyright: ignore[reportArgumentType]
    frames, rewards = [_frame(env)], []
    for _ in range(max_decisions):
        observations, reward, terminated, truncated, _ = env.step(act(observations))
        frames.append(_frame(env))
        rewards.append(float(reward[0]))
        if terminated[0] or truncated[0]:
            break
    return Recording(np.stack(frames), np.array(rewards), float(env.metadata.get("render_fps", 30)))


def write_gif(recording: Recording, path: Path) -> None:
    """Write the film as an endless GIF. It knows hundredths of a second, and readers no less than two of them."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in recording.frames]
    duration = max(20, round(100 / recording.fps) * 10)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)


def _frame(env: VectorEnv) -> np.ndarray:
    frames = env.render()
    if not frames or not isinstance(frames[0], np.ndarray):
        raise RenderingError(f"{env.metadata.get('name', env)} draws no frames: it has no render mode rgb_array")
    return frames[0]
