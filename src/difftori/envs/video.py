"""Videos of episodes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gymnasium.vector import VectorEnv

from difftori.envs.base import RenderingError
from difftori.errors import ConfigError


@dataclass(frozen=True)
class Recording:
    """A recorded episode: `frames` (T+1 height width 3) uint8, `rewards` (T), and `fps` in frames per second."""

    frames: np.ndarray
    rewards: np.ndarray
    fps: float


def record(
    env: VectorEnv, act: Callable[[np.ndarray], np.ndarray], *, seed: int, max_decisions: int = 10_000
) -> Recording:
    """Record the episode of a seed, for at most `max_decisions` agent steps (default: 10,000).

    `env` has one copy. `act` maps observations (1, …) to actions (1, A).
    Raises `RenderingError` if the environment renders no frames, and `ConfigError` for more than one copy.
    """
    if env.num_envs != 1:
        raise ConfigError(
            [f"{env.num_envs} copies of the environment cannot be recorded. Fix: create it with num_envs=1"]
        )
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
    """Write the recording as a looping GIF. Frame times are rounded to 0.01 s, and at least 0.02 s, the minimum of viewers."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in recording.frames]
    duration = max(20, round(100 / recording.fps) * 10)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)


def _frame(env: VectorEnv) -> np.ndarray:
    frames = env.render()
    if not frames or not isinstance(frames[0], np.ndarray):
        raise RenderingError(
            f"{env.metadata.get('name', env)} renders no frames, because it has no render mode rgb_array. Fix: omit the video"
        )
    return frames[0]
