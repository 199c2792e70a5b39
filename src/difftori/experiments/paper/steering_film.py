"""A film of `difftori study steering`: the same episode without and with the cost, side by side."""

from pathlib import Path

import numpy as np

from difftori.envs.pusht import PLANE
from difftori.envs.video import Recording, write_gif
from difftori.experiments.paper.steering_cases import Ball

_EVERY = 2
"""Every second frame is shown."""
_GAP = 4
"""Pixels between the two."""


def write_side_by_side(without: Recording, with_cost: Recording, ball: Ball | None, path: Path) -> None:
    """Write two recordings of Push-T as one GIF at twice the speed, with the outline of the ball. The shorter one stops at its last frame."""
    parts = [np.concatenate((one.frames[:-1:_EVERY], one.frames[-1:])) for one in (without, with_cost)]
    length = max(map(len, parts))
    parts = [np.concatenate((frames, np.repeat(frames[-1:], length - len(frames), 0))) for frames in parts]
    if ball is not None:
        parts = [np.stack([_outlined(image, ball) for image in frames]) for frames in parts]
    gap = np.full((length, parts[0].shape[1], _GAP, 3), 255, np.uint8)
    frames = np.concatenate((parts[0], gap, parts[1]), 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial.gif")
    write_gif(Recording(frames, np.zeros(length - 1), without.fps), partial)
    partial.replace(path)


def _outlined(image: np.ndarray, ball: Ball) -> np.ndarray:
    from PIL import Image, ImageDraw

    drawn, scale = Image.fromarray(image), len(image) / PLANE
    corners = [scale * (value + sign * ball.radius) for sign in (-1, 1) for value in ball.centre]
    ImageDraw.Draw(drawn).ellipse(corners, outline=(213, 94, 0), width=2)
    return np.asarray(drawn)
