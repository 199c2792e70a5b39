"""Sets a robosuite simulation to the seed of an episode, or to a recorded state."""

import importlib
import xml.etree.ElementTree as ET
from typing import Any
from xml.parsers import expat

import numpy as np

from difftori.envs.robomimic_simulation import RobomimicTask
from difftori.errors import ConfigError

SAFE_TAGS = ("body", "geom", "joint", "freejoint", "site", "inertial")
"""Elements of a body in MuJoCo's XML that neither read files nor define anything else."""

NAMED_TAGS = ("geom", "joint", "freejoint", "site")


def reset_to_seed(simulation: Any, seed: int | None) -> None:
    """Reset the simulation. The seed and the actions then determine the episode, bit by bit; None continues the random stream."""
    if seed is not None:
        # The generator is shared by robots, models and samplers, so it is not replaced.
        simulation.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
    simulation.reset()


def reset_to_state(simulation: Any, task: RobomimicTask, state: np.ndarray, model_file: object) -> None:
    """Reset the simulation to a state of a data set: time, positions and velocities, of this version of robosuite or an earlier one.

    `model_file`: the model of the episode, in MuJoCo's XML. Of it, only the body whose size is random is used, because models of
    other versions do not load; tasks without one do not need it. Raises `ConfigError`.
    """
    _check(simulation, state)
    if task.random_body:
        if not isinstance(model_file, str):
            raise ConfigError(
                [f"robomimic: {task.env} needs model_file, because its model is random. Fix: give that of the episode"]
            )
        model = _with_body(simulation.model.get_xml(), model_file, task.random_body)
        _check_model(model, task.random_body, len(state))
        simulation.reset_from_xml_string(model)
    else:
        simulation.deterministic_reset = True
        simulation.reset()
        simulation.deterministic_reset = False
    set_state(simulation, state)


def set_state(simulation: Any, state: np.ndarray) -> None:
    """Set another state of the same model. Raises `ConfigError` for one of another size, or that is not finite."""
    _check(simulation, state)
    simulation.sim.set_state_from_flattened(state)
    simulation.sim.forward()
    for robot in simulation.robots:
        robot.part_controllers["right"].update(force=True)
    simulation.update_state()


def _check(simulation: Any, state: np.ndarray) -> None:
    size = 1 + simulation.sim.model.nq + simulation.sim.model.nv
    if state.shape != (size,) or not np.isfinite(state).all():
        raise ConfigError(
            [
                f"robomimic: the state has shape {state.shape} or is not finite. Fix: give {size} finite numbers, "
                "time, positions and velocities, as in robomimic's `states`"
            ]
        )


def _check_model(model: str, name: str, size: int) -> None:
    """Compile the model, because robosuite cannot be used any more after one that MuJoCo refuses. Raises `ConfigError`."""
    mujoco: Any = importlib.import_module("mujoco")
    try:
        made = mujoco.MjModel.from_xml_string(model)
    except ValueError as error:
        raise ConfigError(
            [f"robomimic: MuJoCo refuses the body {name!r} of model_file ({error}). Fix: restore the file"]
        ) from error
    if 1 + made.nq + made.nv != size:
        raise ConfigError([f"robomimic: the body {name!r} of model_file has other joints. Fix: restore the file"])


def _with_body(model: str, other: str, name: str) -> str:
    """Return a model whose body of this name is that of another model."""
    root, body = ET.fromstring(model), _body(other, name)
    for parent in root.iter():
        for place, child in enumerate(list(parent)):
            if child.tag == "body" and child.get("name") == name:
                missing = _names(child) - _names(body)
                if missing:
                    raise ConfigError(
                        [
                            f"robomimic: the body {name!r} of model_file has no {', '.join(sorted(missing))}. "
                            "Fix: give the model of this task"
                        ]
                    )
                parent.remove(child)
                parent.insert(place, body)
                return ET.tostring(root, encoding="unicode")
    raise AssertionError(f"no body {name} in the model")


def _names(body: ET.Element) -> set[str]:
    """Return the names of all geoms, joints and sites of a body, which robosuite looks up."""
    return {f"{one.tag.removeprefix('free')} {one.get('name')}" for one in body.iter() if one.tag in NAMED_TAGS}


def _body(model: str, name: str) -> ET.Element:
    """Return the body of an untrusted model. Raises `ConfigError` if it does not exist or is unsafe."""
    reader = expat.ParserCreate()
    reader.StartDoctypeDeclHandler = _refuse_doctype
    try:
        reader.Parse(model, True)
        root = ET.fromstring(model)
    except (expat.ExpatError, ET.ParseError, ValueError) as error:
        raise ConfigError([f"robomimic: model_file is no XML ({error}). Fix: restore the file"]) from error
    found = [body for body in root.iter("body") if body.get("name") == name]
    if len(found) != 1:
        raise ConfigError([f"robomimic: model_file has {len(found)} bodies {name!r}. Fix: give the model of this task"])
    unsafe = [one.tag for one in found[0].iter() if one.tag not in SAFE_TAGS or "file" in one.attrib]
    if unsafe:
        raise ConfigError([f"robomimic: the body {name!r} of model_file contains {unsafe[0]!r}. Fix: restore the file"])
    return found[0]


def _refuse_doctype(*_: object) -> None:
    raise ConfigError(["robomimic: model_file defines entities or a document type. Fix: remove them"])
