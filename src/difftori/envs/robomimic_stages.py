"""The vocabulary of scripted experts for robosuite's arms: poses, stages, and the loop that turns stages into actions.

Positions are in metres and rotations are matrices (3 3), both in the world frame. A hand's frame is its grip site: z points
out of the palm, x along the motion of the jaws. Actions are those of the delta controller, 7 numbers in ±1: 1 is 0.05 m, or
0.5 rad about a world axis, and for the gripper 1 closes and −1 opens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from difftori.envs.robomimic_actions import POSITION_SCALE, ROTATION_SCALE
from difftori.errors import ConfigError

OPEN, CLOSED = -1.0, 1.0
POSITION_GAIN, ROTATION_GAIN = 2.0, 1.5
"""Action per remaining distance, both in units of the controller."""
UP = np.array([0.0, 0.0, 1.0])
HAND_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""The rotation of a hand that points down at heading 0: its y axis is the world's x axis."""


class Pose(NamedTuple):
    """A position (3) and a rotation (3 3)."""

    position: np.ndarray
    rotation: np.ndarray

    def point(self, local: Sequence[float]) -> np.ndarray:
        """Return the world position (3) of a point given in this pose's frame."""
        return self.position + self.rotation @ np.asarray(local)

    @property
    def heading(self) -> float:
        """The direction of the x axis in the horizontal plane, in radians."""
        return heading(self.rotation[:, 0])

    @property
    def height(self) -> float:
        """The height of the position."""
        return float(self.position[2])

    def at(self, height: float) -> "Pose":
        """Return this pose at another height."""
        return Pose(np.array([self.position[0], self.position[1], height]), self.rotation)


def heading(direction: np.ndarray) -> float:
    """Return the angle of a vector (3) in the horizontal plane, from the world's x axis, in radians."""
    return float(np.arctan2(direction[1], direction[0]))


def horizontal(vector: np.ndarray) -> float:
    """Return the length of the horizontal part of a vector (2 or 3)."""
    return float(np.hypot(vector[0], vector[1]))


def wrap(angle: float) -> float:
    """Return the angle in [−π, π) that is equal up to full turns."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def nearest(angle: float, symmetry: float, target: float) -> float:
    """Return which of `angle`, `angle + symmetry`, … is nearest to `target`, in [−π, π)."""
    return wrap(angle + symmetry * round((target - angle) / symmetry))


def about_z(angle: float) -> np.ndarray:
    """Return the rotation (3 3) by `angle` about the vertical axis."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def hand_down(angle: float) -> np.ndarray:
    """Return the rotation (3 3) of a hand that points down, with its y axis at this heading and its jaws across it."""
    return about_z(angle) @ HAND_DOWN


def shortest_rotation(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the rotation (3 3) by the smallest angle that turns the unit vector `start` (3) to `end` (3)."""
    cosine = float(start @ end)
    if cosine < -1 + 1e-9:  # opposite: half a turn about any perpendicular axis
        axis = np.cross(start, np.eye(3)[np.argmin(np.abs(start))])
        return 2 * np.outer(axis, axis) / (axis @ axis) - np.eye(3)
    cross = _skew(np.cross(start, end))
    return np.eye(3) + cross + cross @ cross / (1 + cosine)


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Return the axis times the angle in [0, π] (3) of a rotation (3 3)."""
    axis_sine = np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    sine, cosine = float(np.linalg.norm(axis_sine)) / 2, (np.trace(rotation) - 1) / 2
    if sine > 1e-6:
        return axis_sine / 2 / sine * np.arctan2(sine, cosine)
    if cosine > 0:
        return axis_sine / 2
    axis = (rotation + np.eye(3))[:, np.argmax(np.diag(rotation))]  # half a turn: the sign is arbitrary
    return np.pi * axis / np.linalg.norm(axis)


def _skew(vector: np.ndarray) -> np.ndarray:
    x, y, z = vector
    return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])


def _pose(position: np.ndarray, rotation: np.ndarray) -> Pose:
    """Copy a pose from the simulator's arrays, which change with every step."""
    return Pose(position.copy(), rotation.reshape(3, 3).copy())


def never() -> bool:
    """Return False: the condition of a stage that ends by its limit only."""
    return False


def always() -> bool:
    """Return True: the condition of a stage that ends when the hand is at its goal."""
    return True


@dataclass(frozen=True)
class Stage:
    """A part of a script: move the hand to `goal`, computed anew at every step, with the gripper at `gripper`.

    The stage ends when the hand is within `tolerance` (metres, radians) of the goal and `until` is true, or after `limit`
    steps. With `retry`, reaching the limit starts the routine again instead, as `lost` does at any step. `speed` bounds each
    number of the action.
    """

    name: str
    goal: Callable[[], Pose]
    gripper: float
    tolerance: tuple[float, float] = (np.inf, np.inf)
    until: Callable[[], bool] = always
    limit: int | None = None
    retry: bool = False
    lost: Callable[[], bool] = never
    speed: float = 1.0


class Arm:
    """One arm of a robosuite environment: its hand, the objects around it, and the stage that it is in.

    `routine` plans the stages that remain from the present state of the simulation. It is called when an episode starts, and
    again when a stage is lost.
    """

    def __init__(self, env: Any, number: int, routine: "Routine"):
        self.env = env
        self.start = Pose(np.zeros(3), np.eye(3))
        """The hand's pose when the present stage began."""
        self.partner: Arm = self
        """The other arm, if there is one."""
        self._site = env.robots[number].eef_site_id["right"]
        self._routine = routine
        self._stages: Sequence[Stage] = ()
        self._present, self._steps = 0, 0

    @property
    def hand(self) -> Pose:
        """The pose of the grip site."""
        data = self.env.sim.data
        return _pose(data.site_xpos[self._site], data.site_xmat[self._site])

    @property
    def stage(self) -> str:
        """The name of the present stage."""
        return self._stages[self._present].name

    def body(self, name: str) -> Pose:
        """Return the pose of a body of the simulation."""
        data, index = self.env.sim.data, self.env.sim.model.body_name2id(name)
        return _pose(data.body_xpos[index], data.body_xmat[index])

    def site(self, name: str) -> Pose:
        """Return the pose of a site of the simulation."""
        data, index = self.env.sim.data, self.env.sim.model.site_name2id(name)
        return _pose(data.site_xpos[index], data.site_xmat[index])

    def geom(self, name: str) -> Pose:
        """Return the pose of a geom of the simulation."""
        data, index = self.env.sim.data, self.env.sim.model.geom_name2id(name)
        return _pose(data.geom_xpos[index], data.geom_xmat[index])

    def moved(self, offset: Sequence[float] | np.ndarray, rotation: np.ndarray | None = None) -> Pose:
        """Return the hand's pose after a motion by `offset` (3) and a rotation (3 3), which move what it holds in the same way."""
        hand = self.hand
        return Pose(hand.position + offset, hand.rotation if rotation is None else rotation @ hand.rotation)

    def passed(self, name: str) -> bool:
        """Whether the stage of that name has ended."""
        return name in [stage.name for stage in self._stages[: self._present]]

    def begin(self) -> None:
        """Plan the stages from the present state."""
        self._stages = self._routine(self)
        self._enter(0)

    def act(self) -> np.ndarray:
        """Return the action (7) of this step, and go on to the next stage if the present one ends with it."""
        if self._stages[self._present].lost():
            self.begin()
        stage = self._stages[self._present]
        self._steps += 1
        goal, hand = stage.goal(), self.hand
        distance, turn = goal.position - hand.position, rotation_vector(goal.rotation @ hand.rotation.T)
        motion = np.concatenate([POSITION_GAIN * distance / POSITION_SCALE, ROTATION_GAIN * turn / ROTATION_SCALE])
        if (
            np.linalg.norm(distance) < stage.tolerance[0]
            and np.linalg.norm(turn) < stage.tolerance[1]
            and stage.until()
        ):
            self._enter(self._present + 1)
        elif stage.limit is not None and self._steps >= stage.limit:
            if stage.retry:
                self.begin()
            else:
                self._enter(self._present + 1)
        return np.append(np.clip(motion, -stage.speed, stage.speed), stage.gripper)

    def _enter(self, number: int) -> None:
        """Begin a stage. The last one has no end."""
        if number < len(self._stages):
            self._present, self._steps, self.start = number, 0, self.hand


Routine: TypeAlias = Callable[[Arm], Sequence[Stage]]
"""Plans the stages of one arm from the present state of the simulation."""


def hold(arm: Arm, name: str, gripper: float, *, steps: int) -> Stage:
    """Return a stage that keeps the hand where it is for a number of steps, to open or close the gripper."""
    return Stage(name, lambda: arm.start, gripper, until=never, limit=steps)


def grasp(
    arm: Arm, what: str, target: Callable[[], Pose], *, above: float = 0.08, steps: int = 12, speed: float = 0.6
) -> list[Stage]:
    """Return the stages that grasp an object: to a point `above` (metres) the hand's `target`, down to it, and close.

    `steps`: for closing. `speed`: of the way down.
    """

    def over() -> Pose:
        position, rotation = target()
        return Pose(position + [0.0, 0.0, above], rotation)

    return [
        Stage(f"above the {what}", over, OPEN, tolerance=(0.015, 0.08)),
        Stage(f"down to the {what}", target, OPEN, tolerance=(0.006, 0.1), limit=60, speed=speed),
        hold(arm, f"close on the {what}", CLOSED, steps=steps),
    ]


class Script:
    """A scripted expert. It reads the simulation, and keeps the stage of each arm during an episode.

    `routines`: one for each arm. `noise`: standard deviation of the Gaussian noise that is added to the motion, in units of
    the action, so that the episodes show how errors are corrected. The gripper gets none.
    """

    def __init__(self, routines: Sequence[Routine], *, noise: float):
        self.noise = noise
        self._routines = routines
        self._arms: list[Arm] = []
        self._rng = np.random.default_rng(0)

    @property
    def stages(self) -> tuple[str, ...]:
        """The name of each arm's present stage."""
        return tuple(arm.stage for arm in self._arms)

    def reset(self, sim: Any, rng: np.random.Generator) -> None:
        """Begin an episode of the robosuite environment `sim`. All randomness of the script is drawn from `rng`."""
        self._rng = rng
        self._arms = [Arm(sim, number, routine) for number, routine in enumerate(self._routines)]
        if len(self._arms) == 2:
            left, right = self._arms
            left.partner, right.partner = right, left
        for arm in self._arms:
            arm.begin()

    def act(self, sim: Any) -> np.ndarray:
        """Return the action (7 per arm) of the next step, in ±1, float64. It includes the noise, and is meant to be executed.

        Raises `ConfigError` if the script was not reset with this environment.
        """
        if not self._arms or self._arms[0].env is not sim:
            raise ConfigError(["the script has no episode of this environment. Fix: call reset(sim, rng) first"])
        actions = np.stack([arm.act() for arm in self._arms])
        actions[:, :6] += self.noise * self._rng.standard_normal((len(self._arms), 6))
        return np.clip(actions, -1.0, 1.0).ravel()
