"""Creates robosuite's simulations of the Robomimic tasks: their names, controllers and limits."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from difftori.envs.opengl import import_drawing
from difftori.errors import MissingExtraError

Numbers3 = tuple[float, float, float]

CONTROL_FREQ = 20
"""Actions per second."""
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5
"""Motion of an action of 1: metres, and radians."""


@dataclass(frozen=True)
class RobomimicTask:
    """A task. `env` is robosuite's name, `arms` the number of robots, and `max_steps` robomimic's limit for proficient-human data.

    `cameras` and their `side` in pixels are robomimic's. `object_size` is the length of `object`. `rebuilt`: every reset
    builds the model again, because a part of it is random. `low` and `high` bound the goal positions of absolute actions, in
    metres, in the world frame.
    """

    env: str
    max_steps: int
    cameras: tuple[str, ...]
    object_size: int
    low: Numbers3
    high: Numbers3
    arms: int = 1
    side: int = 84
    rebuilt: bool = False


_AGENT = ("agentview", "robot0_eye_in_hand")
TASKS = {
    "lift": RobomimicTask("Lift", 400, _AGENT, 10, (-0.5, -0.5, 0.7), (0.5, 0.5, 1.5), rebuilt=True),
    "can": RobomimicTask("PickPlaceCan", 400, _AGENT, 14, (-0.5, -0.7, 0.7), (0.5, 0.7, 1.5)),
    "square": RobomimicTask("NutAssemblySquare", 400, _AGENT, 14, (-0.5, -0.5, 0.7), (0.5, 0.5, 1.5)),
    "transport": RobomimicTask(
        "TwoArmTransport",
        700,
        ("shouldercamera0", "shouldercamera1", "robot0_eye_in_hand", "robot1_eye_in_hand"),
        41,
        (-0.7, -0.9, 0.7),
        (0.7, 0.9, 1.5),
        arms=2,
        rebuilt=True,
    ),
    "tool_hang": RobomimicTask(
        "ToolHang", 700, ("sideview", "robot0_eye_in_hand"), 44, (-0.5, -0.5, 0.7), (0.5, 0.5, 1.5), side=240
    ),
}
"""The tasks in robomimic's order."""


def create_simulation(task: RobomimicTask, *, absolute: bool, needs_images: bool) -> Any:
    """Create robosuite's environment, with actions (7·arms): a motion, or with `absolute` a position and a rotation vector.

    Raises `MissingExtraError` (extra `robomimic`) and `RenderingError` (no OpenGL).
    """
    robosuite = import_robosuite(needs_images=needs_images)
    return robosuite.make(
        task.env,
        robots=["Panda"] * task.arms,
        controller_configs=[_controller(absolute) for _ in range(task.arms)],
        control_freq=CONTROL_FREQ,
        hard_reset=task.rebuilt,
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
        raise MissingExtraError("Robomimic needs the extra `robomimic`. Fix: pip install 'difftori[robomimic]'")
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


def seed_simulation(simulation: Any, seed: int) -> None:
    """Restart the random numbers of a simulation. Its next reset and the actions then determine the episode, bit by bit.

    The generator itself is shared by robots, models and samplers, so it is not replaced.
    """
    simulation.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state


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
