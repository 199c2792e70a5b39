"""The scripted routine of ToolHang: insert the frame into the stand, then hang the tool on the frame's hook.

Lengths are in metres. The frame's z axis runs along its rod, from the tip to the bar; the bar runs from the rod along −x, and
the hook is a stub at its end. The tool's ring is at −x of its handle.
"""

import numpy as np

from difftori.envs.robomimic_stages import (
    CLOSED,
    OPEN,
    UP,
    Arm,
    Pose,
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

FRAME, TOOL = "frame_root", "tool_root"
GRIP = (0.0438, 0.0, 0.0525)
"""The middle of the frame's grip, in its frame."""
HOOK = (-0.0438, 0.0, 0.096)
"""The middle of the hook, in the frame's frame."""
INSERTED = 0.83
"""The height of the frame's tip below which it is in the stand or on the table."""


def tool_hang(arm: Arm) -> list[Stage]:
    """Insert the frame, unless it is in the stand already, and hang the tool."""
    inserted = _tip(arm).height < INSERTED and not _beside_stand(arm, 0.02)
    return [*([] if inserted else _insert_frame(arm)), *_hang_tool(arm)]


def _insert_frame(arm: Arm) -> list[Stage]:
    """Grasp the frame, which lies flat, turn it upright with the hand, and lower its tip into the stand."""

    def rod() -> np.ndarray:
        return arm.body(FRAME).rotation[:, 2]

    def grip() -> Pose:
        return Pose(arm.body(FRAME).point(GRIP), hand_down(nearest(heading(rod()), np.pi, 0.3)))

    def offset() -> np.ndarray:
        return (_stand(arm) - _tip(arm).position)[:2]

    def upright(height: float, share: float = 1.0) -> Pose:
        return arm.moved([*share * offset(), height], shortest_rotation(rod(), UP))

    def lowered() -> Pose:
        inside = _tip(arm).height < 0.955
        return upright(-0.03 if inside or not _beside_stand(arm, 0.004) else 0.0, 0.5 if inside else 1.0)

    def dropped() -> bool:
        return _tip(arm).height < INSERTED and _beside_stand(arm, 0.02)

    return [
        *grasp(arm, "frame", grip),
        Stage("lift the frame", lambda: Pose(arm.hand.position + 0.05 * UP, arm.start.rotation), CLOSED,
              until=lambda: _tip(arm).height > 0.95, limit=40, retry=True),
        Stage("upright over the stand", lambda: upright(1.03 - _tip(arm).height), CLOSED,
              until=lambda: np.arccos(min(rod()[2], 1.0)) < 0.02 and not _beside_stand(arm, 0.003), lost=dropped),
        Stage("insert the frame", lowered, CLOSED, until=lambda: _tip(arm).height < 0.822, limit=90, lost=dropped, speed=0.5),
        hold(arm, "let the frame go", OPEN, steps=10),
        Stage("back out", lambda: arm.moved(-0.05 * arm.hand.rotation[:, 2]), OPEN, until=never, limit=12, speed=0.6),
        Stage("away from the stand", lambda: arm.moved(0.02 * UP - 0.05 * arm.hand.rotation[:, 2]), OPEN,
              until=lambda: horizontal(arm.hand.position - _stand(arm)) > 0.2, limit=12),
        # The way straight over the stand brings joints to their limits.
        Stage("beside the stand", lambda: Pose(np.array([-0.2, 0.2, 1.12]), hand_down(0.0)), OPEN, tolerance=(0.05, np.inf)),
    ]  # fmt: skip


def _hang_tool(arm: Arm) -> list[Stage]:
    """Grasp the tool in the middle, hold its ring over the hook with the handle outwards, lower it, and let it fall round the hook."""

    def tool() -> Pose:
        return arm.body(TOOL)

    def handle() -> Pose:
        return Pose(tool().position - 0.002 * UP, hand_down(nearest(tool().heading, np.pi, 0.6)))

    def ring() -> Pose:
        return arm.site("tool_hole1_center")

    def offset() -> np.ndarray:
        """From the ring to the hook."""
        return arm.body(FRAME).point(HOOK) - ring().position

    def outwards() -> np.ndarray:
        bar = -arm.body(FRAME).rotation[:, 0] * [1.0, 1.0, 0.0]
        return bar / np.linalg.norm(bar)

    def turn() -> float:
        return wrap(heading(outwards()) - tool().heading)

    def off(distance: float) -> bool:
        return horizontal(offset()) > distance

    def over_hook(height: float) -> Pose:
        rotation = about_z(turn()) @ shortest_rotation(tool().rotation[:, 2], UP)
        return arm.moved([*offset()[:2], height], rotation)

    def depth() -> float:
        """The distance of the ring to its final height, where the hook is in it."""
        return 0.005 - float(offset()[2])

    def dropped() -> bool:
        return ring().height < 0.95

    return [
        Stage("before the stand", lambda: Pose(np.array([-0.22, -0.12, 1.08]), hand_down(0.0)), OPEN, tolerance=(0.05, np.inf)),
        Stage("over the tool", lambda: handle().at(1.0), OPEN, tolerance=(0.03, np.inf)),
        *grasp(arm, "tool", handle),
        Stage("lift the tool", lambda: Pose(arm.hand.position + 0.08 * UP, arm.start.rotation), CLOSED,
              until=lambda: ring().height > 1.11, limit=60, retry=True),
        Stage("over the hook", lambda: over_hook(1.09 - ring().height), CLOSED,
              until=lambda: not off(0.003) and abs(turn()) < 0.06, lost=dropped, speed=0.7),
        Stage("lower the tool", lambda: over_hook(0.0 if off(0.004) else -min(max(depth(), 0.0), 0.02)), CLOSED,
              until=lambda: depth() < 0.003, limit=40, lost=dropped, speed=0.5),
        Stage("let the tool go", lambda: arm.hand, OPEN, until=never, limit=30),
        Stage("leave", lambda: arm.moved(0.05 * outwards() + 0.03 * UP), OPEN, until=never, speed=0.5),
    ]  # fmt: skip


def _tip(arm: Arm) -> Pose:
    return arm.site("frame_tip_site")


def _stand(arm: Arm) -> np.ndarray:
    """Return the middle of the stand's four walls."""
    return np.mean([arm.geom(f"stand_wall{i}").position for i in range(4)], axis=0)


def _beside_stand(arm: Arm, distance: float) -> bool:
    """Whether the frame's tip is farther than this from the stand's axis."""
    return horizontal(_stand(arm) - _tip(arm).position) > distance
