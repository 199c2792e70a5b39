"""The requirements of `difftori study steering`: costs of planned motions, and how often an executed episode violates them.

keep-out    the end effector stays out of a ball
smooth      its speed and jerk stay below limits
around      Push-T only: it goes around the block counter-clockwise
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from difftori.envs.pusht import PLANE
from difftori.steering import PlanFunction

RequirementName: TypeAlias = Literal["keep-out", "smooth", "around"]
_MARGIN = 1.2
"""The cost of `keep-out` begins at this multiple of the ball's radius, that of `smooth` at the limits divided by it."""
_TURN, _NEAR = 0.1, 60.0
"""The smallest clockwise turn that violates, in radians per step, and the distance from the block, in pixels, below which turns do not count."""
_LEAD = 2
"""Push-T's disc follows its target with a delay of about two steps."""
_HAND_STEP, _HAND_RATE, _COAST = 0.01, 0.27, 6
"""MetaWorld: motion of the hand's target by an action of 1, in metres; share of the distance to it that the hand moves per step; and
steps after the plan in which it is followed further, because it does not stop at once."""
_HAND_BEFORE = slice(18, 21)
"""The hand's position one step earlier in MetaWorld's state."""


@dataclass(frozen=True)
class Ball:
    """A region to stay out of: `centre` and `radius`, in the task's units of length."""

    centre: tuple[float, ...]
    radius: float


@dataclass(frozen=True)
class SteeringTask:
    """A task: its environment and observations, the numbers of its requirements, and the predicted motion of its end effector.

    `dims`: D, the first numbers of an observation, are the present position. `path`, `motion`: the executed actions of a plan (B P A) and
    present observations (B S) → positions (B N D) that must keep out, and those whose speed and jerk are limited. `speed`, `jerk`: limits
    per step and per step³. `window`: options of the training. `version`: to raise when the task's numbers, its costs or measures, or the
    solver of projections change; evaluations of before are then run again.
    """

    env: str
    obs: str
    dims: int
    ball: Ball
    speed: float
    jerk: float
    path: Callable[[Tensor, Tensor], Tensor]
    motion: Callable[[Tensor, Tensor], Tensor]
    executed: int
    window: Mapping[str, int]
    version: int

    @property
    def name(self) -> str:
        """The name of the task in tables."""
        return self.env.partition(":")[2] or self.env


@dataclass(frozen=True)
class Requirement:
    """A requirement of a task: the cost of a plan, and the number of an episode's steps that violate it, from its observations (T S)."""

    cost: PlanFunction
    violations: Callable[[np.ndarray], int]


def requirement(task: SteeringTask, name: RequirementName) -> Requirement:
    """Return the cost and the measure of a requirement. The cost depends on the actions that are executed only, the same for all policies."""

    def executed(cost: Callable[[Tensor, Tensor], Tensor]) -> PlanFunction:
        return lambda actions, obs: cost(actions[:, : task.executed], obs["state"])

    if name == "keep-out":
        return Requirement(
            executed(lambda actions, state: _depth(task.path(actions, state), task.ball)),
            lambda states: _steps_inside(states[:, : task.dims], task.ball),
        )
    if name == "smooth":
        return Requirement(
            executed(lambda actions, state: _excess(task.motion(actions, state), task)),
            lambda states: _steps_above(states[:, : task.dims], task.speed, task.jerk),
        )
    return Requirement(
        executed(lambda actions, state: _clockwise(task.path(actions, state) - state[:, None, 2:4])),
        lambda states: _steps_clockwise(states[:, :2], states[:, 2:4]),
    )


def _depth(path: Tensor, ball: Ball) -> Tensor:
    """The squared depths in the ball, with its margin, of positions after the first, and of the middles between them, in radii."""
    points = torch.cat((path[:, 1:], (path[:, 1:] + path[:, :-1]) / 2), 1)
    depth = _MARGIN - _norm(points - path.new_tensor(ball.centre)) / ball.radius
    return depth.clamp_min(0).square().sum(-1)


def _steps_inside(positions: np.ndarray, ball: Ball) -> int:
    """Steps whose segment meets the ball, after the end effector was outside of it for the first time; all if it never is."""
    centre = np.array(ball.centre)
    outside = np.linalg.norm(positions - centre, axis=1) >= ball.radius
    positions = positions[np.argmax(outside) :]
    start, motion = positions[:-1], np.diff(positions, axis=0)
    length = np.maximum((motion**2).sum(1), 1e-12)
    place = np.clip(((centre - start) * motion).sum(1) / length, 0, 1)
    return int((np.linalg.norm(start + place[:, None] * motion - centre, axis=1) < ball.radius).sum())


def _excess(positions: Tensor, task: SteeringTask) -> Tensor:
    """The squared excess of speeds and jerks over their limits with a margin, in limits."""
    excess = positions.new_zeros(len(positions))
    for order, limit in ((1, task.speed / _MARGIN), (3, task.jerk / _MARGIN)):
        excess = excess + (_norm(positions.diff(order, dim=1)) / limit - 1).clamp_min(0).square().sum(-1)
    return excess


def _steps_above(positions: np.ndarray, speed: float, jerk: float) -> int:
    """Steps with a speed or a jerk above its limit."""
    above = np.linalg.norm(np.diff(positions, axis=0), axis=1) > speed
    above[2:] |= np.linalg.norm(np.diff(positions, 3, axis=0), axis=1) > jerk
    return int(above.sum())


def _clockwise(relative: Tensor) -> Tensor:
    """The squared clockwise turns of positions (B N 2) around the origin. Smooth also at the origin, where turns do not count."""
    before, after = relative[:, :-1], relative[:, 1:]
    turns = _cross(before, after) / (_norm(before) * _norm(after) + _NEAR**2 / 4)
    return turns.clamp(max=0).square().sum(-1)


def _steps_clockwise(positions: np.ndarray, blocks: np.ndarray) -> int:
    """Steps that turn clockwise around the block by more than a threshold, at a distance from it."""
    middle = (blocks[1:] + blocks[:-1]) / 2
    before, after = (torch.from_numpy(place - middle) for place in (positions[:-1], positions[1:]))
    turns = torch.atan2(_cross(before, after), (before * after).sum(-1))
    far = torch.minimum(before.norm(dim=-1), after.norm(dim=-1)) > _NEAR
    return int((far & (turns < -_TURN)).sum())


def _cross(before: Tensor, after: Tensor) -> Tensor:
    """Positive if the step turns counter-clockwise on screen, where the y axis points down."""
    return before[..., 1] * after[..., 0] - before[..., 0] * after[..., 1]


def _norm(values: Tensor) -> Tensor:
    """The length of vectors (… D), with a finite gradient at 0."""
    return (values.square().sum(-1) + 1e-12).sqrt()


def _push_t_path(actions: Tensor, state: Tensor) -> Tensor:
    """The present position and the targets. Actions are targets, ±1 for the borders of the plane."""
    return torch.cat((state[:, None, :2], _targets(actions)), 1)


def _push_t_motion(actions: Tensor, state: Tensor) -> Tensor:
    """The targets, which the disc follows with a delay, after the place where it would be at the present speed, on its way to the first target."""
    targets = _targets(actions)
    first = state[:, None, :2] + (targets[:, :1] - state[:, None, :2]) * (_LEAD / (_LEAD + 1))
    return torch.cat((first, targets), 1)


def _targets(actions: Tensor) -> Tensor:
    return (actions + 1) * (PLANE / 2)


def _hand(actions: Tensor, state: Tensor) -> Tensor:
    """The hand one step earlier, now, and after each action and some further steps. It follows its target, which the actions move.

    The target is ahead of the hand by the present motion divided by the rate.
    """
    hand = state[:, :3]
    before = state[:, _HAND_BEFORE]
    target, path = hand + (hand - before) / _HAND_RATE, [before, hand]
    moves = torch.nn.functional.pad(_HAND_STEP * actions[..., :3], (0, 0, 0, _COAST))
    for move in moves.unbind(1):
        target = target + move
        hand = hand + _HAND_RATE * (target - hand)
        path.append(hand)
    return torch.stack(path, 1)


_WINDOW = {"horizon": 8, "n_action_steps": 4}
_PUSH_T = {"path": _push_t_path, "motion": _push_t_motion, "executed": 8, "window": {}, "version": 1}
_METAWORLD = {"path": _hand, "motion": _hand, "executed": 4, "window": _WINDOW, "version": 2}
_CEILING, _POST = Ball((0.0, 0.63, 0.335), 0.12), Ball((0.0, 0.68, 0.17), 0.03)
TASKS = (
    SteeringTask("pusht", "pose", 2, Ball((120.0, 360.0), 40.0), 12.0, 10.0, **_PUSH_T),
    SteeringTask("metaworld:sweep-into", "state", 3, _CEILING, 0.0075, 0.002, **_METAWORLD),
    SteeringTask("metaworld:pick-out-of-hole", "state", 3, _POST, 0.0075, 0.002, **_METAWORLD),
)
"""The balls lie where demonstrations pass: before the block, over the start of sweep-into, and on the way to the hole, below the hand. The limits
are below what demonstrations reach: the largest speeds are a third (Push-T) and half (MetaWorld) higher, or more."""
REQUIREMENTS: Mapping[str, tuple[RequirementName, ...]] = {
    task.name: ("keep-out", "smooth", "around") if task.env == "pusht" else ("keep-out", "smooth") for task in TASKS
}
"""The requirements of each task, by its name."""
