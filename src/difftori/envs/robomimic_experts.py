"""Scripted experts of the robomimic tasks, which see the whole simulation, and the routines of Lift, Can and Square.

Each task is a routine per arm: the list of its stages, planned from the state of the simulation (see `robomimic_stages`).
Lengths are in metres and angles in radians.

Recorded actions are those that are executed, including the noise. Then the seed and the actions of an episode reproduce it,
as everywhere in this library. The noise has zero mean and is independent of the state, so the mean of the recorded actions
in a state is the noise-free action, and regression learns the same policy from either.
"""

from itertools import product

import numpy as np

from difftori.envs.base import choice_fault
from difftori.envs.robomimic_stages import (
    CLOSED,
    OPEN,
    UP,
    Arm,
    Pose,
    Routine,
    Script,
    Stage,
    about_z,
    grasp,
    hand_down,
    heading,
    hold,
    horizontal,
    nearest,
    never,
    shortest_rotation,
    wrap,
)
from difftori.envs.robomimic_tool_hang import tool_hang
from difftori.envs.robomimic_transport import give_hammer, take_hammer
from difftori.errors import ConfigError

QUARTER = np.pi / 2


def make_script(task: str) -> Script:
    """Create the scripted expert of a task: `lift`, `can`, `square`, `tool_hang` or `transport`. Its noise is `NOISE` of the task.

    Raises `ConfigError` for an unknown task.
    """
    faults = choice_fault("task", task, tuple(ROUTINES))
    if faults:
        raise ConfigError(faults)
    return Script(ROUTINES[task], noise=NOISE[task])


def lift(arm: Arm) -> list[Stage]:
    """Grasp the cube, and lift it."""
    rotation = hand_down(nearest(arm.body("cube_main").heading, QUARTER, _heading(arm)))
    return [
        *grasp(arm, "cube", lambda: Pose(arm.body("cube_main").position, rotation), above=0.06, steps=8),
        Stage("lift", lambda: arm.moved([0.0, 0.0, 0.1]), CLOSED, until=never),
    ]


def can(arm: Arm) -> list[Stage]:
    """Grasp the can from above, carry it over its bin, lower it and let go."""
    height = 1.13  # of the hand above the bins' walls
    rotation = hand_down(_heading(arm))
    target = arm.env.target_bin_placements[arm.env.object_to_id["can"]]

    def body() -> Pose:
        return arm.body("Can_main")

    def offset() -> np.ndarray:
        return target[:2] - body().position[:2]

    def over_bin() -> Pose:
        return Pose(arm.moved([*offset(), 0.0]).position, rotation).at(height)

    return [
        *grasp(arm, "can", lambda: Pose(body().position + 0.02 * UP, rotation), above=0.1),
        Stage("lift", lambda: Pose(arm.start.position, rotation).at(height), CLOSED,
              until=lambda: body().height > 1.05, limit=40, retry=True),
        Stage("over the bin", over_bin, CLOSED, until=lambda: horizontal(offset()) < 0.03, lost=lambda: body().height < 0.95),
        Stage("lower", lambda: Pose(arm.start.position, rotation).at(target[2] + 0.1), CLOSED, tolerance=(0.02, 1.0), limit=40),
        *_release(arm),
    ]  # fmt: skip


def square(arm: Arm) -> list[Stage]:
    """Grasp the nut by its handle, lift it, align the nut itself with the peg, lower it and let go."""
    height = 1.0  # of the nut while it is carried
    peg = arm.body("peg1").position
    flip, placed = _least_wrist_turn(arm.body("SquareNut_main").heading)

    def nut() -> Pose:
        return arm.body("SquareNut_main")

    def handle() -> Pose:
        return Pose(nut().point([0.06, 0.0, 0.0]), hand_down(wrap(nut().heading + flip)))

    def offset() -> np.ndarray:
        return (peg - nut().position)[:2]

    def turn() -> float:
        return wrap(placed - nut().heading)

    def lifted() -> Pose:
        return Pose(arm.moved([0.0, 0.0, height - nut().height]).position, arm.start.rotation)

    def aligned(rise: float) -> Pose:
        return arm.moved([*offset(), rise], about_z(turn()) @ shortest_rotation(nut().rotation[:, 2], UP))

    def off(distance: float) -> bool:
        return horizontal(offset()) > distance

    return [
        *grasp(arm, "handle", handle, steps=10),
        Stage("lift", lifted, CLOSED, until=lambda: nut().height > height - 0.02, limit=40, retry=True),
        Stage("over the peg", lambda: aligned(height - nut().height), CLOSED,
              until=lambda: not off(0.004) and abs(turn()) < 0.03, lost=lambda: nut().height < 0.86, limit=120, retry=True),
        Stage("lower", lambda: aligned(0.0 if off(0.006) else -0.03), CLOSED,
              until=lambda: nut().height < 0.845, lost=lambda: nut().height < 0.86 and off(0.04), limit=70, speed=0.6),
        *_release(arm),
    ]  # fmt: skip


def _release(arm: Arm) -> list[Stage]:
    return [
        hold(arm, "open", OPEN, steps=10),
        Stage("leave", lambda: arm.moved([0.0, 0.0, 0.08]), OPEN, until=never),
    ]


def _heading(arm: Arm) -> float:
    """Return the heading of the hand's y axis."""
    return heading(arm.hand.rotation[:, 1])


def _least_wrist_turn(nut: float) -> tuple[float, float]:
    """Return how to hold and place a nut of this heading so that the wrist turns least.

    The result is the hand's heading minus the nut's, 0 or π, and the nut's final heading, a multiple of π/2. Heading 0 is
    left out: the handle would be beyond the peg, out of reach.
    """

    def cost(choice: tuple[float, float]) -> float:
        flip, placed = choice
        begin, turn = wrap(nut + flip), wrap(placed - nut)
        return max(abs(begin), abs(begin + turn)) + 0.1 * abs(turn)

    return min(product((0.0, np.pi), (QUARTER, np.pi, -QUARTER)), key=cost)


ROUTINES: dict[str, tuple[Routine, ...]] = {
    "lift": (lift,),
    "can": (can,),
    "square": (square,),
    "tool_hang": (tool_hang,),
    "transport": (give_hammer, take_hammer),
}
"""The routines of each task, one for each arm."""
NOISE = {"lift": 0.1, "can": 0.1, "square": 0.1, "tool_hang": 0.02, "transport": 0.1}
"""Standard deviation of the noise on the actions of each task, at which the expert still succeeds in (nearly) every episode."""
