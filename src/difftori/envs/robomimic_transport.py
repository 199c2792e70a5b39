"""The scripted routines of Transport's two arms: a hammer from a closed bin, over from hand to hand, into an emptied bin.

Lengths are in metres. Either end of the hammer may point to the receiver. The arms meet at two places: the receiver approaches when
the hammer is held out, and the giver opens its hand when the receiver's is closed.
"""

from collections.abc import Callable

import numpy as np

from difftori.envs.robomimic_stages import (
    CLOSED,
    OPEN,
    UP,
    Arm,
    Pose,
    Stage,
    always,
    grasp,
    hand_down,
    heading,
    hold,
    horizontal,
    nearest,
    never,
    shortest_rotation,
)

HANDOVER = np.array([0.0, 0.0, 1.08])
"""Where the hammer's middle is handed over."""
GIVER_GRIP, RECEIVER_GRIP = 0.06, 0.0825
"""Distances of the hands from the hammer's middle. Next to the head, the giver's open hand would lift the hammer with it."""
LEAN = 0.3
"""The angle by which the receiver's hand leans away from the other arm, so that the wrists do not collide."""
LID_PLACE = (-0.21, -0.46)
"""Where the lid is put down."""
ALONG_Y = np.array([0.0, 1.0, 0.0])
LIFTED = 0.95
"""Objects above this height are in the air."""


def give_hammer(arm: Arm) -> list[Stage]:
    """Put the lid aside, unless it is there already, take the hammer out of the bin, hold it out, and let go when asked."""
    aside = horizontal(_lid(arm).position[:2] - LID_PLACE) < 0.1
    return [*([] if aside else _put_lid_aside(arm)), *_hold_out_hammer(arm)]


def take_hammer(arm: Arm) -> list[Stage]:
    """Put the trash into its bin, unless it is there already, take the hammer from the other hand and put it into the bin."""
    return [*([] if arm.env.transport.trash_in_trash_bin else _remove_trash(arm)), *_receive_hammer(arm)]


def _put_lid_aside(arm: Arm) -> list[Stage]:
    rotation = hand_down(np.pi / 2)
    return [
        *grasp(arm, "lid", lambda: Pose(_lid(arm).position, rotation)),
        _way("lift the lid", (0.2, -0.45, 1.08), rotation, CLOSED),
        _way("carry the lid", (*LID_PLACE, 1.08), rotation, CLOSED),
        Stage("put the lid down", lambda: Pose(np.array([*LID_PLACE, arm.hand.height - 0.03]), rotation), CLOSED,
              until=lambda: _lid(arm).height < 0.852, limit=60, speed=0.6),
        hold(arm, "let the lid go", OPEN, steps=8),
        _way("leave the lid", (-0.15, -0.46, 1.08), rotation, OPEN),
    ]  # fmt: skip


def _hold_out_hammer(arm: Arm) -> list[Stage]:
    def hammer() -> Pose:
        return arm.body("payload_root")

    def end() -> Pose:
        position = hammer().position - GIVER_GRIP * _handle(arm) - [0.0, 0.0, 0.004]
        return Pose(position, hand_down(heading(_handle(arm))))

    def held_out() -> Pose:
        return arm.moved(HANDOVER - hammer().position, shortest_rotation(_handle(arm), ALONG_Y))

    def is_held_out() -> bool:
        distance = float(np.linalg.norm(HANDOVER - hammer().position))
        return distance < 0.015 and horizontal(_handle(arm) - ALONG_Y) < 0.1

    def dropped() -> bool:
        return hammer().height < LIFTED

    def leaving() -> Pose:
        x, y, _ = arm.hand.position
        return Pose(np.array([x, max(y - 0.05, -0.35), 1.25]), arm.start.rotation)

    return [
        *grasp(arm, "hammer", end, above=0.2),
        # Straight up first: nearer to its base the arm locks.
        Stage("lift the hammer", lambda: arm.start.at(arm.hand.height + 0.04),
              CLOSED, until=lambda: hammer().height > 0.965, limit=50, retry=True),
        Stage("out of the bin", lambda: Pose(np.array([0.7 * arm.start.position[0], arm.start.position[1] + 0.15, 1.12]), arm.start.rotation),
              CLOSED, until=lambda: arm.hand.height > 1.08, limit=60, lost=dropped),
        Stage("hold the hammer out", held_out, CLOSED, until=is_held_out, limit=100, lost=dropped, speed=0.8),
        Stage("keep still", lambda: arm.start, CLOSED, until=lambda: arm.partner.passed("close on the offered hammer"), speed=0.5),
        hold(arm, "let the hammer go", OPEN, steps=10),
        # Straight up first: the hammer's head may be on this arm's side of the hand.
        Stage("withdraw", lambda: arm.start.at(1.25), OPEN, until=lambda: arm.hand.height > 1.18, limit=30, speed=0.8),
        Stage("leave", leaving, OPEN, until=never, speed=0.8),
    ]  # fmt: skip


def _remove_trash(arm: Arm) -> list[Stage]:
    rotation = hand_down(-np.pi / 2)

    def trash() -> Pose:
        position, _ = pose = arm.body("trash_main")
        return Pose(position, hand_down(nearest(pose.heading, np.pi / 2, -np.pi / 2)))

    x, y, _ = arm.env.transport.trash_bin_pos
    return [
        *grasp(arm, "trash", trash, above=0.2, speed=0.4),
        Stage("lift the trash", lambda: arm.start.at(1.06), CLOSED,
              until=lambda: trash().height > 1.0, limit=50, retry=True),
        _way("over the trash bin", (x, y, 1.06), rotation, CLOSED),
        _way("lower the trash", (x, y, 0.96), rotation, CLOSED),
        hold(arm, "let the trash go", OPEN, steps=8),
        _way("leave the trash", (0.05, 0.35, 1.25), rotation, OPEN, retry=True,
             until=lambda: arm.env.transport.trash_in_trash_bin),
    ]  # fmt: skip


def _receive_hammer(arm: Arm) -> list[Stage]:
    rotation = shortest_rotation(UP, np.array([0.0, np.sin(LEAN), np.cos(LEAN)])) @ hand_down(-np.pi / 2)
    above = Pose(HANDOVER + [0.0, RECEIVER_GRIP + 0.02, 0.14], rotation)

    def hammer() -> Pose:
        return arm.body("payload_root")

    def offered() -> Pose:
        return Pose(hammer().position + RECEIVER_GRIP * _handle(arm), rotation)

    def over_bin(height: float) -> Pose:
        return Pose(arm.moved([*offset(), 0.0]).position, rotation).at(height)

    def offset() -> np.ndarray:
        return (arm.env.transport.target_bin_pos - hammer().position)[:2]

    return [
        Stage("wait for the hammer", lambda: above, OPEN, until=lambda: arm.partner.stage == "keep still", speed=0.8),
        Stage("down to the offered hammer", offered, OPEN, tolerance=(0.007, 0.1), limit=60, speed=0.5),
        hold(arm, "close on the offered hammer", CLOSED, steps=12),
        Stage("keep hold", lambda: arm.start, CLOSED, until=lambda: arm.partner.passed("withdraw"), speed=0.5),
        Stage("over the bin", lambda: over_bin(1.1), CLOSED, until=lambda: horizontal(offset()) < 0.03, limit=120, speed=0.8),
        Stage("lower the hammer", lambda: over_bin(arm.hand.height - 0.04), CLOSED,
              until=lambda: arm.hand.height < 0.88, limit=40, speed=0.7),
        hold(arm, "let the hammer go", OPEN, steps=8),
        Stage("leave", lambda: Pose(arm.start.position, rotation).at(1.1), OPEN, until=never),
    ]  # fmt: skip


def _way(
    name: str,
    position: tuple[float, float, float],
    rotation: np.ndarray,
    gripper: float,
    *,
    until: Callable[[], bool] = always,
    retry: bool = False,
) -> Stage:
    """Return a stage that moves the hand to a fixed place, roughly."""
    goal = Pose(np.array(position), rotation)
    return Stage(name, lambda: goal, gripper, tolerance=(0.03, 0.1), until=until, limit=80, retry=retry)


def _lid(arm: Arm) -> Pose:
    """Return the pose of the lid's handle."""
    return arm.geom("transport_start_bin_lid_handle")


def _handle(arm: Arm) -> np.ndarray:
    """Return the direction (3) of the hammer's handle, towards the receiver's side."""
    direction = arm.body("payload_root").rotation[:, 2]
    return direction if direction[1] > 0 else -direction
