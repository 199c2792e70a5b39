"""Converts robomimic's data sets to observations and actions of the Robomimic environments.

What a file's metadata `env_args` says about robosuite's version and controller is considered:

- robosuite before 1.5 wrote `object` in another order, and the hand's position relative to Lift's cube with the other sign;
- its motions are in the world frame; those of 1.5 are in the frame that `input_ref_frame` names, by default the robot's base.

Data sets of `difftori collect` have the environment's order and frame.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from difftori.envs.robomimic_actions import (
    DEGENERATE,
    MOTION,
    POSITION_SCALE,
    ROTATION_SCALE,
    absolute_actions,
    from_rotation_vectors,
    turned_motions,
)
from difftori.envs.robomimic_simulation import CONTROL_FREQ, ROBOT, TASKS, arm_parts, image_parts
from difftori.errors import ConfigError, DataError

Arrays = dict[str, np.ndarray]

ABSOLUTE_KEY = "actions_abs"
"""Robomimic's key of absolute actions."""
_REACH = 0.25
"""A pose further than this from the hand, in metres, is no goal of a controller."""
_POSE = 14
"""Numbers of an object in `object`: its pose (7), and its pose relative to the hand (7)."""
_SCALE = [POSITION_SCALE] * 3 + [ROTATION_SCALE] * 3
_CONTROLLER: dict[str, Any] = {
    "type": "OSC_POSE",
    "input_type": "delta",
    "control_delta": True,
    "input_min": -1,
    "input_max": 1,
    "output_min": [-value for value in _SCALE],
    "output_max": _SCALE,
    "kp": 150,
    "damping": 1,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "uncouple_pos_ori": True,
}
"""Settings of the controller that a file must not contradict."""


@dataclass(frozen=True)
class Layout:
    """How a data set stores `object`, in the order before robosuite 1.5 or not, and the frame of its motions: world or base."""

    before_1_5: bool = False
    in_base_frame: bool = False


def recorded(task: str) -> dict[str, tuple[str, ...]]:
    """Return the arrays of robomimic's data sets that each observation type is computed from."""
    hands = arm_parts(TASKS[task].arms)
    return {"state": ("object", *hands), "image": (*image_parts(task), *hands)}


def from_recorded(
    stored: Arrays,
    motions: np.ndarray,
    *,
    task: str,
    obs: str,
    about: Mapping[str, Any],
    action_key: str | None,
    actions: str,
) -> tuple[Arrays, np.ndarray]:
    """Convert the arrays of a data set (T …) to observations and actions of the environment. Motions are clipped to ±1, as executed.

    Absolute actions are computed from the motions and the hands' poses; with `--action-key actions_abs`, the stored ones are
    used, and also if `actions` are poses, as in the files that Diffusion Policy converts. Raises `ConfigError` for data of another task, controller or control frequency, and `DataError` for a quaternion of zeros.
    """
    layout = read_layout(task, about)
    hands = arm_parts(TASKS[task].arms)
    pose = np.concatenate([stored[name] for name in hands], 1)
    if obs == "state":
        entries = {"state": np.concatenate([objects(task, stored["object"], layout), pose], 1)}
    else:
        entries = {"agent_pos": pose} | {name: stored[name] for name in image_parts(task)}
    if motions.shape[1] != MOTION * TASKS[task].arms:
        return entries, motions  # the size is refused with the environment's
    split = np.split(motions, TASKS[task].arms, 1)
    is_absolute = action_key is not None and action_key.rpartition("/")[2] == ABSOLUTE_KEY
    is_absolute = is_absolute or all(
        _are_poses(given, stored[f"robot{arm}_eef_pos"]) for arm, given in enumerate(split)
    )
    if is_absolute and (actions != "absolute" or layout.in_base_frame):
        raise ConfigError([_wrong_key(actions, action_key)])
    converted = []
    for arm, given in enumerate(split):
        if is_absolute:
            converted.append(from_rotation_vectors(given))
            continue
        motion = np.clip(given, -1.0, 1.0)
        if layout.in_base_frame:
            motion = turned_motions(motion, TASKS[task].base_angles[arm])
        position, quaternion = stored[f"robot{arm}_eef_pos"], stored[f"robot{arm}_eef_quat"]
        if actions == "absolute":
            _check_quaternions(quaternion, f"robot{arm}_eef_quat")
            motion = absolute_actions(position, quaternion, motion)
        converted.append(motion)
    return entries, np.concatenate(converted, 1)


def _are_poses(actions: np.ndarray, hand: np.ndarray) -> bool:
    """Whether actions (T 7) are poses near the hand (T 3): motions are in ±1, and the hand's rotation is near π."""
    is_beyond = bool(np.abs(actions[:, :6]).max(initial=0.0) > 1.001)
    return is_beyond and bool(np.linalg.norm(actions[:, :3] - hand, axis=1).max(initial=0.0) < _REACH)


def _check_quaternions(quaternions: np.ndarray, name: str) -> None:
    broken = np.flatnonzero(~(np.linalg.norm(quaternions, axis=1) > DEGENERATE))  # also NaN
    if len(broken):
        raise DataError(
            f"demos: {name} of step {broken[0]}, counted over all demonstrations, is {quaternions[broken[0]].tolist()}, "
            "which is no rotation. Fix: exclude this demonstration"
        )


def objects(task: str, stored: np.ndarray, layout: Layout) -> np.ndarray:
    """Return `object` (T n) in the order of robosuite 1.5, which the environment has."""
    if not layout.before_1_5:
        return stored
    if task == "lift":
        return np.concatenate([stored[:, :7], -stored[:, 7:]], 1)
    if task == "transport":  # the two flags of success were last
        return np.concatenate([stored[:, :27], stored[:, -2:], stored[:, 27:-2]], 1)
    count = stored.shape[1] // _POSE
    poses, rest = stored[:, : count * _POSE].reshape(len(stored), count, 2, _POSE // 2), stored[:, count * _POSE :]
    return np.concatenate([poses[:, :, ::-1].reshape(len(stored), -1), rest], 1)


def objects_before_1_5(task: str, shown: np.ndarray) -> np.ndarray:
    """Return the environment's `object` (T n) in the order of robosuite before 1.5. The inverse of `objects`."""
    if task == "transport":
        return np.concatenate([shown[:, :27], shown[:, 29:], shown[:, 27:29]], 1)
    return objects(task, shown, Layout(before_1_5=True))  # an exchange, or a change of sign


def read_task(about: Mapping[str, Any]) -> str:
    """Return the task that a robomimic file with this metadata was recorded in. Raises `ConfigError` for another environment."""
    name = _read_args(about.get("env_args")).get("env_name")
    found = [task for task, known in TASKS.items() if known.env == name]
    if not found:
        known = ", ".join(one.env for one in TASKS.values())
        raise ConfigError([f"env_args: the environment {name!r} is unknown. Fix: give a file of one of {known}"])
    return found[0]


def read_layout(task: str, about: Mapping[str, Any]) -> Layout:
    """Return the layout of a data set with this metadata. Raises `ConfigError` if it is not one of this task."""
    if "env_args" not in about:
        if about.get("env") == f"robomimic:{task}":
            return Layout()
        raise ConfigError(
            [
                f"demos: they are of {about.get('env', 'an environment that their metadata do not name by env_args')}, not of "
                f"robomimic:{task}. Fix: give robomimic's file of this task, or demonstrations that difftori collect recorded in it"
            ]
        )
    args = _read_args(about["env_args"])
    version = re.match(r"(\d+)\.(\d+)", str(args.get("env_version", "1.2")))
    kwargs = args.get("env_kwargs", {})
    if version is None or not isinstance(kwargs, dict):
        raise ConfigError(
            [f"demos: env_args has the version {args.get('env_version')!r} or no env_kwargs. Fix: restore them"]
        )
    before_1_5 = (int(version[1]), int(version[2])) < (1, 5)
    faults = []
    robots = kwargs.get("robots") or ROBOT
    if any(robot != ROBOT for robot in (robots if isinstance(robots, list) else [robots])):
        faults.append(
            f"demos: recorded with the robots {robots}, but the environment has {ROBOT}. Fix: give other demos"
        )
    if args.get("env_name") != TASKS[task].env:
        faults.append(
            f"demos: recorded in {args.get('env_name')!r}, not in {TASKS[task].env!r}. Fix: choose another --env"
        )
    if kwargs.get("control_freq", CONTROL_FREQ) != CONTROL_FREQ:
        faults.append(
            f"demos: recorded with control_freq {kwargs['control_freq']}, but the environment has {CONTROL_FREQ}. Fix: give other demos"
        )
    frames = set()
    for arm in _arm_configs(kwargs.get("controller_configs", {})):
        faults += [
            f"demos: recorded with a controller whose {name} is {arm[name]!r}, but the environment has {wanted!r}. Fix: give other demos"
            for name, wanted in _CONTROLLER.items()
            if name in arm and not _equal(arm[name], wanted)
        ]
        frames.add("world" if before_1_5 else arm.get("input_ref_frame", "base"))
    if len(frames) > 1 or not frames <= {"world", "base"}:
        faults.append(
            f"demos: motions in the frames {sorted(map(str, frames))}. Fix: give demos in the world or base frame"
        )
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return Layout(before_1_5, in_base_frame=frames == {"base"} or (not frames and not before_1_5))


def _read_args(text: Any) -> dict[str, Any]:
    try:
        args = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError([f"demos: env_args is no JSON ({error}). Fix: restore the file"]) from error
    if not isinstance(args, dict):
        raise ConfigError([f"demos: env_args is a {type(args).__name__}, not an object. Fix: restore the file"])
    return args


def _arm_configs(found: Any) -> list[dict[str, Any]]:
    """Return the configurations of the arms' controllers: robosuite's before 1.5 is one, that of 1.5 contains them as parts."""
    if isinstance(found, list):
        return [arm for one in found for arm in _arm_configs(one)]
    if not isinstance(found, dict):
        raise ConfigError([f"demos: controller_configs is a {type(found).__name__}. Fix: restore env_args"])
    if "body_parts" not in found:
        return [found] if found else []
    parts = found["body_parts"]
    parts = parts.get("arms", parts) if isinstance(parts, dict) else {}
    # Files list the parts of other robots too; a Panda has its right arm only.
    return [arm for name, arm in parts.items() if name == "right" and isinstance(arm, dict)]


def _equal(found: Any, wanted: Any) -> bool:
    """Whether two settings are equal. A number stands for a list of six."""
    if isinstance(wanted, str | bool) or isinstance(found, str | bool):
        return found == wanted
    try:
        return bool(np.allclose(np.broadcast_to(np.asarray(found, dtype=float), 6), wanted))
    except (TypeError, ValueError):
        return False


def _wrong_key(actions: str, key: str | None) -> str:
    place = f"action_key: {key or 'actions'!r} of these demonstrations"
    if actions != "absolute":
        return f"{place} are absolute actions. Fix: --env-options actions=absolute, or give the key or the file of the motions"
    return (
        f"{place} are in the frame of the robot's base. "
        "Fix: give the key of the motions (default: actions); absolute actions are then computed from them"
    )
