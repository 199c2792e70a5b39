"""Actions of the Robomimic environments: motions of the hand (7 an arm), and absolute goals of the hand (10 an arm).

A motion is (position 3, rotation vector 3, gripper), ±1, in the world frame. An absolute action is (position 3, the first two
rows of the rotation matrix 6, gripper), metres, in the world frame. The controller's frame is the site between the fingers,
whose rotation is that of the hand `eef_quat`, turned by −90° about its z axis.
"""

from typing import Any

import numpy as np

from difftori.errors import NonFiniteError

MOTION, ABSOLUTE = 7, 10
"""Numbers an arm."""
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5
"""Motion of an action of 1: metres, and radians."""
DEGENERATE = 1e-6
"""Length below which the two rows of a rotation are zero or parallel."""


def controller_goals(action: np.ndarray) -> np.ndarray:
    """Return an absolute action (10·arms) as robosuite's controller takes it: position, rotation vector, gripper (7·arms).

    The rows of the rotation are made orthonormal (Gram–Schmidt). Raises `NonFiniteError` if they are zero or parallel.
    """
    arms = np.asarray(action, dtype=np.float64).reshape(-1, ABSOLUTE)
    vectors = _rotations().from_matrix(_orthonormal(arms[:, 3:9])).as_rotvec()
    return np.concatenate([arms[:, :3], vectors, arms[:, 9:]], 1).ravel()


def absolute_actions(positions: np.ndarray, quaternions: np.ndarray, motions: np.ndarray) -> np.ndarray:
    """Return the absolute actions (T 10) of one arm that have the same goals as these motions (T 7) of the controller.

    `positions` (T 3) and `quaternions` (T 4, xyzw) are the hand's, before each action.
    """
    rotation = _rotations()
    goals = positions + POSITION_SCALE * motions[:, :3]
    site = rotation.from_quat(quaternions) * rotation.from_euler("z", -90, degrees=True)
    turned = rotation.from_rotvec(ROTATION_SCALE * motions[:, 3:6]) * site
    return _joined(goals, turned, motions[:, 6:])


def from_rotation_vectors(actions: np.ndarray) -> np.ndarray:
    """Return robomimic's `actions_abs` of one arm (T 7), with a rotation vector, as absolute actions (T 10)."""
    return _joined(actions[:, :3], _rotations().from_rotvec(actions[:, 3:6]), actions[:, 6:])


def turned_motions(motions: np.ndarray, angle: float) -> np.ndarray:
    """Return motions of one arm (T 7) in the frame of its base, turned by `angle` about z, as motions in the world frame."""
    turn = _rotations().from_euler("z", angle)
    return np.concatenate([turn.apply(motions[:, :3]), turn.apply(motions[:, 3:6]), motions[:, 6:]], 1)


def _joined(positions: np.ndarray, rotations: Any, grippers: np.ndarray) -> np.ndarray:
    rows = rotations.as_matrix()[:, :2].reshape(-1, 6)
    return np.concatenate([positions, rows, grippers], 1)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Return the rotation matrices (N 3 3) whose first two rows have these directions (N 6)."""
    first, second = rows[:, :3], rows[:, 3:]
    first = _unit(first, rows)
    second = _unit(second - (first * second).sum(1, keepdims=True) * first, rows)
    return np.stack([first, second, np.cross(first, second)], 1)


def _unit(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > DEGENERATE).all():
        raise NonFiniteError(
            f"robomimic: the rows {rows.round(6).tolist()} of an absolute action are zero or parallel, so they are no rotation. "
            "Fix: give the first two rows of a rotation matrix"
        )
    return vectors / lengths


def _rotations() -> Any:
    """SciPy's rotations; SciPy comes with robosuite."""
    from scipy.spatial.transform import Rotation

    return Rotation
