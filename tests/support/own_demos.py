"""Demonstrations as robot learners bring them: a point goes home, seen by a camera, in the layout of each format."""

from pathlib import Path

import h5py
import numpy as np

from difftori.data.formats import write_lerobot, write_zarr
from difftori.data.trajectories import Trajectories

SIDE = 40
"""Height and width of the images, in pixels."""


def episodes(count: int = 4, length: int = 10, seed: int = 0, sign: float = 1.0):
    """States (T 2), actions (T 2), images (T SIDE SIDE 3) and the ends of the episodes."""
    rng = np.random.default_rng(seed)
    states, actions, ends = [], [], []
    for _ in range(count):
        place = rng.uniform(-1, 1, 2)
        for _ in range(length):
            action = np.clip(-3 * place, -1, 1)
            states.append(place)
            actions.append(sign * action)
            place = place + action / 3
        ends.append(len(states))
    images = rng.integers(0, 256, (len(states), SIDE, SIDE, 3), dtype=np.uint8)
    return np.array(states, np.float32), np.array(actions, np.float32), images, ends


def write_lerobot_set(path: Path, *, videos: bool = False, **options) -> str:
    """LeRobot v3 with `observation.state` and `observation.images.top`."""
    states, actions, images, ends = episodes(**options)
    write_lerobot(
        Trajectories.of({"state": states, "top": images}, actions, ends), path, fps=10, task="go home", videos=videos
    )
    return str(path)


def write_robomimic_set(path: Path, **options) -> str:
    """robomimic: `data/demo_k/obs/{robot0_eef_pos, agentview_image, agentview/depth}`, and a list `mask/train`."""
    states, actions, images, ends = episodes(**options)
    with h5py.File(path, "w") as file:
        start = 0
        for number, end in enumerate(ends):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = end - start
            demo["actions"] = actions[start:end].astype(np.float64)
            demo["obs/robot0_eef_pos"] = states[start:end].astype(np.float64)
            demo["obs/agentview_image"] = images[start:end]
            demo["obs/agentview/depth"] = images[start:end, :, :, :1].astype(np.float32) / 100
            demo["next_obs/robot0_eef_pos"] = states[start:end]
            start = end
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    return str(path)


def write_zarr_set(path: Path, **options) -> str:
    """Diffusion Policy's layout: `data/{state, img, action}`, `meta/episode_ends`."""
    states, actions, images, ends = episodes(**options)
    write_zarr(Trajectories.of({"state": states, "img": images}, actions, ends), path)
    return str(path)
