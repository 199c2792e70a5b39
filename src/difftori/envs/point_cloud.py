"""Converts a depth image to a point cloud of fixed size, as in DP3 (Ze et al. 2024, arXiv 2403.03954).

The camera looks along −z, with x to the right and y up. For a pixel in column u and row v of h rows and w columns, whose
depth along the axis is d, with the focal length f = (h/2)/tan(fovy/2) in pixels:

    point = ( (u − w/2)·d/f,  −(v − h/2)·d/f,  −d )

u and v start at 0, as in DP3, so points are half a pixel to the left of and above the pixel's centre.
"""

import numpy as np

from difftori.errors import DataError, MissingExtraError

BUCKETS = 3
"""Height of fpsample's tree, which makes the search faster; 3 is fpsample's recommendation for small clouds."""


def camera_rays(height: int, width: int, fovy: float) -> np.ndarray:
    """Return the point of each pixel at depth 1 (height·width 3). Multiply it by the depth. `fovy` is in degrees."""
    focal = height / 2 / np.tan(np.deg2rad(fovy) / 2)
    rows, columns = np.mgrid[:height, :width]
    rays = np.stack([(columns - width / 2) / focal, -(rows - height / 2) / focal, -np.ones((height, width))], axis=-1)
    return rays.reshape(-1, 3)


def tilt(about_x: float, about_y: float) -> np.ndarray:
    """Return DP3's rotation X·Y (3 3) of camera coordinates, p' = X·Y·p. Both angles are in degrees.

    X rotates y towards −z, Y rotates z towards x.
    """
    x, y = np.deg2rad([about_x, about_y])
    turn_x = np.array([[1.0, 0.0, 0.0], [0.0, np.cos(x), np.sin(x)], [0.0, -np.sin(x), np.cos(x)]])
    turn_y = np.array([[np.cos(y), 0.0, np.sin(y)], [0.0, 1.0, 0.0], [-np.sin(y), 0.0, np.cos(y)]])
    return turn_x @ turn_y


def cropped(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the points (N 3) strictly between two corners (3), in order."""
    return points[((points > low) & (points < high)).all(axis=1)]


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """Select `count` of the points (N 3) by farthest point sampling: float32 (count 3).

    Deterministic: the first point depends only on the cloud. If there are fewer than `count` points, they are repeated in
    order. Differs from DP3, where the first point is that of the first pixel, and zeros are added. Raises `DataError` if
    there is no point, and `MissingExtraError` (extra `metaworld`, for fpsample).
    """
    if len(points) == 0:
        raise DataError(f"cannot sample a cloud of {count} points: none is left inside the crop. Fix: widen the crop")
    points = np.ascontiguousarray(points, dtype=np.float32)
    if len(points) <= count:
        return np.resize(points, (count, 3))
    try:
        from fpsample import bucket_fps_kdline_sampling
    except ImportError as error:
        raise MissingExtraError(
            "point clouds need fpsample, from the extra `metaworld`. Fix: pip install 'difftori[metaworld]' in Python 3.10 to 3.12"
        ) from error
    return points[bucket_fps_kdline_sampling(points, count, h=min(BUCKETS, int(np.log2(len(points)))), start_idx=0)]
