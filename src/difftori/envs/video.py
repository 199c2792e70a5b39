"""Videos of episodes."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from gymnasium.vector import VectorEnv

from difftori.envs.base import EnvironmentRestarted, RenderingError


@dataclass(frozen=True)
class Recording:
    """A recorded episode: `frames` (T+1 height width 3) uint8, `rewards` (T), and `fps` in frames per second."""

    frames: np.ndarray
    rewards: np.ndarray
    fps: float


def write_video(recording: Recording, folder: Path, name: str) -> Path:
    """Write the recording to `folder/name.mp4` (H.264), or, without PyAV, to `folder/name.gif`. Returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import av
    except ImportError:
        path = folder / f"{name}.gif"
        write_gif(recording, path)
        return path
    path = folder / f"{name}.mp4"
    height, width = (side - side % 2 for side in recording.frames.shape[1:3])  # yuv420p needs even sides
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(recording.fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in recording.frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_gif(recording: Recording, path: Path) -> None:
    """Write the recording as a looping GIF. Frame times are rounded to 0.01 s, and at least 0.02 s, the minimum of viewers."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in recording.frames]
    duration = max(20, round(100 / recording.fps) * 10)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)


def frame(env: VectorEnv) -> np.ndarray:
    """Return a frame (height width 3) uint8 of the first copy. Raises `RenderingError` if the environment renders none."""
    try:
        frames = env.render()
    except EnvironmentRestarted as error:
        raise RenderingError(
            f"{env.metadata.get('name', env)} cannot render ({error.__cause__}). Fix: omit the video, or let its render() return an image "
            "(height width 3) of bytes"
        ) from error
    if not frames or not isinstance(frames[0], np.ndarray):
        raise RenderingError(
            f"{env.metadata.get('name', env)} renders no frames, because it has no render mode rgb_array. Fix: omit the video"
        )
    return frames[0]
