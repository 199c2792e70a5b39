"""From a depth image to a point cloud of fixed size, as DP3 makes it (Ze et al. 2024, arXiv 2403.03954).

A camera sees along −z, with x to the right and y up. For a pixel in column u and row v of h rows and w columns, whose
depth along the axis is d, with the focal length f = (h/2)/tan(fovy/2) in pixels:

    point = ( (u − w/2)·d/f,  −(v − h/2)·d/f,  −d )

u and v count from 0 as in DP3, which places points half a pixel to the left and up of the pixel's middle.
"""

import numpy as np

from difftori.errors import DataError, MissingExtraError

BUCKETS = 3
"""Height of the tree with which fpsample finds the same points faster; 3 is its advice for small clouds."""


def camera_rays(height: int, width: int, fovy: float) -> np.ndarray:
    """The point (height·width 3) that each pixel shows at depth 1; `fovy` in degrees. Times a depth, its point."""
    focal = height / 2 / np.tan(np.deg2rad(fovy) / 2)
    rows, columns = np.mgrid[:height, :width]
    rays = np.stack([(columns - width / 2) / focal, -(rows - height / 2) / focal, -np.ones((height, width))], axis=-1)
    return rays.reshape(-1, 3)


def tilt(about_x: float, about_y: float) -> np.ndarray:
    """The rotation X·Y (3 3) that DP3 turns camera coordinates by; both angles in degrees, p' = X·Y·p.

    X turns y towards −z, Y turns z towards x.
    """
    x, y = np.deg2rad([about_x, about_y])
    turn_x = np.array([[1.0, 0.0, 0.0], [0.0, np.cos(x), np.sin(x)], [0.0, -np.sin(x), np.cos(x)]])
    turn_y = np.array([[np.cos(y), 0.0, np.sin(y)], [0.0, 1.0, 0.0], [-np.sin(y), 0.0, np.cos(y)]])
    return turn_x @ turn_y


def cropped(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Those of the points (N 3) that lie strictly between two corners (3), in order."""
    return points[((points > low) & (points < high)).all(axis=1)]


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """`count` of the points (N 3), each the farthest from those before it: float32 (count 3).

    Deterministic: the first one depends on the cloud alone. If there are fewer points than `count` they are repeated in
    order. Differs from DP3: there the first is the first pixel's, and zeros are added. Raises `DataError` without any
    point, and `MissingExtraError` (extra `metaworld`, for fpsample).
    """
    if len(points) == 0:
        raise DataError(f"a cloud of {count} points was asked for, but none is left inside the crop; widen it")
    points = np.ascontiguousarray(points, dtype=np.float32)
    if len(points) <= count:
        return np.resize(points, (count, 3))
    try:
        from fpsample import bucket_fps_kdline_sampling
    except ImportError as error:
        raise MissingExtraError(
            "point clouds need fpsample, from the extra `metaworld`: pip install 'difftori[metaworld]'"
        ) from error
    return points[bucket_fps_kdline_sampling(points, count, h=min(BUCKETS, int(np.log2(len(points)))), start_idx=0)]
