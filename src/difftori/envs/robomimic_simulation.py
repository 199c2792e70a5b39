"""Creates robosuite's simulations of the Robomimic tasks: their names, controllers and limits."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from difftori.envs.opengl import import_drawing
from difftori.envs.robomimic_actions import POSITION_SCALE, ROTATION_SCALE
from difftori.errors import MissingExtraError

Numbers3 = tuple[float, float, float]

ROBOT = "Panda"
CONTROL_FREQ = 20
"""Actions per second."""
ARM_PARTS = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}
"""Robomimic's observations of each arm, and their sizes."""


@dataclass(frozen=True)
class RobomimicTask:
    """A task. `env` is robosuite's name, `arms` the number of robots, and `max_steps` robomimic's limit for proficient-human data.

    `cameras` and their `side` in pixels are robomimic's. `object_size` is the length of `object`. `random_body`: every reset
    builds the model again, because the size of this body is random, or "". `low` and `high` bound the goal positions of
    absolute actions, in metres, in the world frame. `base_angles` are the directions of the robots' bases about z, in radians.
    """

    env: str
    max_steps: int
    cameras: tuple[str, ...]
    object_size: int
    low: Numbers3
    high: Numbers3
    arms: int = 1
    side: int = 84
    random_body: str = ""
    base_angles: tuple[float, ...] = (0.0,)


_AGENT = ("agentview", "robot0_eye_in_hand")
TASKS = {
    "square": RobomimicTask("NutAssemblySquare", 400, _AGENT, 14, (-0.5, -0.5, 0.7), (0.5, 0.5, 1.5)),
    "can": RobomimicTask("PickPlaceCan", 400, _AGENT, 14, (-0.5, -0.7, 0.7), (0.5, 0.7, 1.5)),
    "lift": RobomimicTask("Lift", 400, _AGENT, 10, (-0.5, -0.5, 0.7), (0.5, 0.5, 1.5), random_body="cube_main"),
    "transport": RobomimicTask(
        "TwoArmTransport",
        700,
        ("shouldercamera0", "shouldercamera1", "robot0_eye_in_hand", "robot1_eye_in_hand"),
        41,
        (-0.7, -0.9, 0.7),
        (0.7, 0.9, 1.5),
        arms=2,
        random_body="payload_root",
        base_angles=(np.pi / 2, -np.pi / 2),
    ),
    "tool_hang": RobomimicTask(
        "ToolHang", 700, ("sideview", "robot0_eye_in_hand"), 44, (-0.5, -0.5, 0.7), (0.5, 0.5, 1.5), side=240
    ),
}
"""The tasks; the first is the default."""


def arm_parts(arms: int) -> tuple[str, ...]:
    """Return robomimic's names of the observations of all arms, in the order of `state` and `agent_pos`."""
    return tuple(f"robot{arm}_{part}" for arm in range(arms) for part in ARM_PARTS)


def image_parts(task: str) -> tuple[str, ...]:
    """Return robomimic's names of the images of a task."""
    return tuple(f"{camera}_image" for camera in TASKS[task].cameras)


def create_simulation(task: RobomimicTask, *, absolute: bool, needs_images: bool) -> Any:
    """Create robosuite's environment, with actions (7·arms): a motion, or with `absolute` a position and a rotation vector.

    Raises `MissingExtraError` (extra `robomimic`) and `RenderingError` (no OpenGL).
    """
    robosuite = import_robosuite(needs_images=needs_images)
    return robosuite.make(
        task.env,
        robots=[ROBOT] * task.arms,
        controller_configs=[_controller(absolute) for _ in range(task.arms)],
        control_freq=CONTROL_FREQ,
        hard_reset=bool(task.random_body),
        ignore_done=True,
        reward_shaping=False,
        use_object_obs=True,
        use_camera_obs=False,
        has_renderer=False,
        has_offscreen_renderer=False,
        renderer="mujoco",
        **({"env_configuration": "opposed"} if task.arms == 2 else {}),
    )


def import_robosuite(*, needs_images: bool) -> Any:
    """Import robosuite without its messages about optional files. Its errors are still logged.

    Raises `MissingExtraError` and `RenderingError`.
    """
    if importlib.util.find_spec("robosuite") is None:
        raise MissingExtraError(
            "Robomimic needs the extra `robomimic`. Fix: pip install 'difftori[robomimic]' in Python 3.10 or 3.11; "
            "with later versions the extra has no robosuite"
        )
    import_drawing("mujoco", needs_images=needs_images)
    logging.getLogger("robosuite_logs").addFilter(_is_error)
    backend = os.environ.get("MUJOCO_GL")
    robosuite = importlib.import_module("robosuite")
    # robosuite sets the variable to its own backend, which MuJoCo has not selected.
    if backend is None:
        os.environ.pop("MUJOCO_GL", None)
    else:
        os.environ["MUJOCO_GL"] = backend
    return robosuite


def _controller(absolute: bool) -> dict[str, Any]:
    """Return robosuite's configuration of the controller of an arm, with goals in the world frame.

    `input_type` and `input_ref_frame` are explicit: robosuite 1.5 ignores its earlier `control_delta`, and its default frame is
    the robot's base, which is rotated in Transport.
    """
    scale = [POSITION_SCALE] * 3 + [ROTATION_SCALE] * 3
    arm = {
        "type": "OSC_POSE",
        "input_type": "absolute" if absolute else "delta",
        "input_ref_frame": "world",
        "input_min": -1,
        "input_max": 1,
        "output_min": [-value for value in scale],
        "output_max": scale,
        "kp": 150,
        "kp_limits": [0, 300],
        "damping_ratio": 1,
        "damping_ratio_limits": [0, 10],
        "impedance_mode": "fixed",
        "uncouple_pos_ori": True,
        "position_limits": None,
        "orientation_limits": None,
        "interpolation": None,
        "ramp_ratio": 0.2,
        "gripper": {"type": "GRIP"},
    }
    return {"type": "BASIC", "body_parts": {"right": arm}}


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
