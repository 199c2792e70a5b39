"""Reduces ManiSkill's points to the cloud of a policy, as ManiSkill2-Learn does (Gu et al. 2023, arXiv 2302.04659).

    scene  points that a camera sees above the table or ground (z > 1 mm), `POINTS` or `POINTS` − 50 of them, drawn at random
    goal   50 points drawn from a cube of ±1 cm at the goal position, in green; only in tasks that show a goal position
    frame  the tool centre point between the fingers: p' = Rᵀ (p − t)

A row is x, y, z in metres, and red, green, blue from 0 to 1. The random numbers are the episode's: a generator seeded by its
seed draws the clouds one after another, so the seed and the actions determine them.
"""

import numpy as np

from difftori.errors import DataError

POINTS = 1200
GOAL_POINTS = 50
GOAL_SIDE = 0.01
GROUND = 0.001
COLUMNS = 6


def policy_cloud(
    xyzw: np.ndarray, rgb: np.ndarray, tcp_pose: np.ndarray | None, goal: np.ndarray | None, draws: np.random.Generator
) -> np.ndarray:
    """Return the cloud (1200 6) float32 of all points in world coordinates, `xyzw` (N 4) and `rgb` (N 3) uint8.

    w is 0 where a camera saw nothing. `tcp_pose` (7): position, and quaternion w x y z; None: the cloud stays in world
    coordinates. `goal` (3): position, or None. Points of the scene are drawn with repetition if there are too few. Raises
    `DataError` if there is none above the ground.
    """
    seen = np.flatnonzero((xyzw[:, 3] > 0) & (xyzw[:, 2] > GROUND))
    if len(seen) == 0:
        raise DataError(
            f"none of the {len(xyzw)} points of a ManiSkill observation is above the ground. Fix: check its cameras"
        )
    count = POINTS if goal is None else POINTS - GOAL_POINTS
    chosen = draws.choice(seen, count, replace=len(seen) < count)
    points, colours = xyzw[chosen, :3].astype(np.float64), rgb[chosen] / 255.0
    if goal is not None:
        points = np.concatenate([points, goal + draws.uniform(-GOAL_SIDE, GOAL_SIDE, (GOAL_POINTS, 3))])
        colours = np.concatenate([colours, np.tile([0.0, 1.0, 0.0], (GOAL_POINTS, 1))])
    local = points if tcp_pose is None else (points - tcp_pose[:3]) @ rotation(tcp_pose[3:])
    return np.concatenate([local, colours], axis=1).astype(np.float32)


def robot_state(*parts: np.ndarray | None) -> np.ndarray:
    """Return `agent_pos` (… P) float32: joint positions, joint velocities, and the pose of the tool, each (… J) or None."""
    return np.concatenate([part for part in parts if part is not None], axis=-1).astype(np.float32)


def rotation(quaternion: np.ndarray) -> np.ndarray:
    """Return the rotation matrix (3 3) of a unit quaternion w x y z."""
    w, x, y, z = (float(number) for number in quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
