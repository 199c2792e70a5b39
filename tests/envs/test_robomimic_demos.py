"""Data sets of robomimic: order and frame by version, replay. The files were written by robosuite 1.4.1, see fixtures/robomimic_141/make.py."""

import importlib.util
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from difftori.data.formats import read_demos
from difftori.envs import robomimic
from difftori.envs.robomimic_demos import Layout, from_recorded, read_layout, recorded
from difftori.envs.robomimic_simulation import TASKS
from difftori.errors import ConfigError, DataError
from difftori.registry import resolve_env

needs_robosuite = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="needs the extra: pip install 'difftori[robomimic]'"
)
FILES = Path(__file__).parents[1] / "fixtures" / "robomimic_141"

QUATERNIONS = {
    "lift": (3, 13),
    "can": (3, 10, 17),
    "square": (3, 10, 17),
    "transport": (3, 10, 17, 44, 53),
    "tool_hang": (3, 10, 17, 24, 31, 38, 47),
}
"""Where the quaternions of a state begin."""


def converted(task: str, *, obs: str = "state", actions: str = "delta", action_key: str | None = None):
    demos = read_demos(FILES / f"{task}.hdf5", {name: name for name in recorded(task)[obs]}, action=action_key)
    arrays = {name: values.numpy() for name, values in demos.obs.items()}
    return from_recorded(
        arrays, demos.actions.numpy(), task=task, obs=obs, about=demos.about, action_key=action_key, actions=actions
    )


def states(task: str) -> list[tuple[np.ndarray, np.ndarray, str | None]]:
    """States, actions and model of each episode."""
    with h5py.File(FILES / f"{task}.hdf5") as file:
        return [(g["states"][()], g["actions"][()], g.attrs.get("model_file")) for g in file["data"].values()]


def same_signs(shown: np.ndarray, wanted: np.ndarray, task: str) -> np.ndarray:
    """The state with each quaternion of `QUATERNIONS` replaced by its negative, the same rotation, if that is nearer."""
    shown = shown.copy()
    for start in QUATERNIONS[task]:
        if shown[start : start + 4] @ wanted[start : start + 4] < 0:
            shown[start : start + 4] *= -1
    return shown


@needs_robosuite
@pytest.mark.parametrize("task", TASKS)
def test_a_file_of_robosuite_1_4_shows_what_the_environment_shows_and_replays(task):
    """Also the order of `object`, the sign in Lift, the flags of Transport, and the cube and the hammer of the episode."""
    (state, actions, model), *_ = states(task)
    obs = converted(task)[0]["state"]
    env = robomimic.build(task)
    first, info = env.reset(options={"reset_to_state": state[0], "model_file": model})
    assert np.allclose(first, obs[0], atol=1e-5)
    assert info == {"success": False}
    for step in range(9):
        shown, *_ = env.step(actions[step].astype(np.float32))
    assert np.abs(same_signs(shown, obs[9], task) - obs[9]).max() < 0.02
    env.reset(seed=5)
    start = env.simulation.sim.get_state().flatten()
    twin = robomimic.build(task)
    twin.reset(seed=5)
    assert np.array_equal(start, twin.simulation.sim.get_state().flatten())
    env.close()
    twin.close()


@needs_robosuite
@pytest.mark.parametrize("task", ["square", "transport"])
def test_absolute_actions_are_those_that_robomimic_records(task):
    computed = converted(task, actions="absolute")[1]
    stored = converted(task, actions="absolute", action_key="actions_abs")[1]
    assert computed.shape == stored.shape == (len(computed), 10 * TASKS[task].arms)
    # Observations are one physics step late; the recorded goals of the first step are older.
    away = np.abs(computed - stored).reshape(len(computed), -1, 10)[1:-1]
    episode = len(states(task)[0][0])
    away = np.delete(away, episode - 1, 0) if len(computed) > episode else away
    assert away[..., :3].max() < 0.003
    assert away[..., 3:9].max() < 0.02
    assert away[..., 9].max() == 0
    assert robomimic.action_space(task, "absolute").contains(computed[0].astype(np.float32))


@needs_robosuite
@pytest.mark.parametrize("broken", [0.0, np.nan])
def test_a_quaternion_of_zeros_is_refused_with_its_step(broken):
    with h5py.File(FILES / "square.hdf5") as file:
        about = {"env_args": file["data"].attrs["env_args"]}
    arrays = {name: np.ones((3, size)) for name, size in zip(recorded("square")["state"], (14, 3, 4, 2), strict=True)}
    arrays["robot0_eef_quat"][1] = broken
    given = {"task": "square", "obs": "state", "about": about, "action_key": None}
    assert from_recorded(arrays, np.zeros((3, 7)), actions="delta", **given)[1].shape == (3, 7)
    with pytest.raises(DataError, match="robot0_eef_quat of step 1.*Fix"):
        from_recorded(arrays, np.zeros((3, 7)), actions="absolute", **given)


def test_motions_are_clipped_as_executed():
    with h5py.File(FILES / "square.hdf5") as file:
        about = {"env_args": file["data"].attrs["env_args"]}
    arrays = {name: np.zeros((2, size)) for name, size in zip(recorded("square")["state"], (14, 3, 4, 2), strict=True)}
    wild = np.full((2, 7), 3.0)
    _, actions = from_recorded(arrays, wild, task="square", obs="state", about=about, action_key=None, actions="delta")
    assert np.array_equal(actions, np.ones((2, 7)))


def test_absolute_actions_under_the_name_of_motions_are_recognised():
    """Diffusion Policy's converted files: `actions` are poses, and `env_args` are those of the motions."""
    given = {"task": "square", "obs": "state", "action_key": None}
    demos = read_demos(
        FILES / "square.hdf5", {name: name for name in recorded("square")["state"]}, action="actions_abs"
    )
    arrays = {name: values.numpy() for name, values in demos.obs.items()}
    read = from_recorded(arrays, demos.actions.numpy(), actions="absolute", about=demos.about, **given)[1]
    named = from_recorded(
        arrays, demos.actions.numpy(), actions="absolute", about=demos.about, **given | {"action_key": "actions_abs"}
    )[1]
    assert np.array_equal(read, named)
    with pytest.raises(ConfigError, match=r"'actions' of .* are absolute.*actions=absolute"):
        from_recorded(arrays, demos.actions.numpy(), actions="delta", about=demos.about, **given)


def about(
    task: str = "transport", *, version: str | None = "1.5.1", name: str | None = None, **changes
) -> dict[str, str]:
    """Metadata of a file whose arms' controller has these changes."""
    arm = {"type": "OSC_POSE", "output_max": [0.05] * 3 + [0.5] * 3, "input_max": 1, **changes}
    config = {"type": "BASIC", "body_parts": {"arms": {"right": arm, "left": {"type": "OSC_POSE", "kp": 3}}}}
    kwargs = {"controller_configs": [config] * TASKS[task].arms, "control_freq": 20}
    args = {"env_name": name or TASKS[task].env, "env_kwargs": kwargs} | ({"env_version": version} if version else {})
    return {"env_args": json.dumps(args)}


@pytest.mark.parametrize(
    ("version", "changes", "layout"),
    [
        ("1.5.1", {}, Layout(False, True)),
        ("1.5.1", {"input_ref_frame": "base"}, Layout(False, True)),
        ("1.5.1", {"input_ref_frame": "world"}, Layout(False, False)),
        ("1.4.1", {}, Layout(True, False)),
        (None, {"control_delta": True, "damping": 1}, Layout(True, False)),
    ],
)
def test_the_frame_and_the_order_follow_from_version_and_controller(version, changes, layout):
    assert read_layout("transport", about(version=version, **changes)) == layout


def test_data_of_our_own_collection_have_the_environments_layout():
    assert read_layout("square", {"env": "robomimic:square", "obs": "state"}) == Layout()
    with pytest.raises(ConfigError, match="robomimic:square"):
        read_layout("square", {"env": "robomimic:lift"})
    with pytest.raises(ConfigError, match="env_args"):
        read_layout("square", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Stack"}, "Stack"),
        ({"input_ref_frame": "camera"}, "camera"),
        ({"output_max": [0.1] * 6}, "output_max"),
        ({"control_delta": False}, "control_delta"),
        ({"input_type": "absolute"}, "input_type"),
        ({"kp": 300}, "kp"),
        ({"type": "JOINT_POSITION"}, "JOINT_POSITION"),
        ({"version": "new"}, "new"),
    ],
)
def test_other_tasks_controllers_and_frames_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_layout("transport", about(**changes))


@pytest.mark.parametrize("text", ["{", "[1]", json.dumps({"env_name": "Lift", "env_kwargs": 3})])
def test_damaged_metadata_are_refused(text):
    with pytest.raises(ConfigError, match="env_args"):
        read_layout("lift", {"env_args": text})


@pytest.mark.parametrize("robots", [["Sawyer"], "Sawyer"])
def test_another_robot_is_refused(robots):
    args = json.loads(about("lift")["env_args"])
    args["env_kwargs"]["robots"] = ["Panda"]
    read_layout("lift", {"env_args": json.dumps(args)})
    args["env_kwargs"]["robots"] = robots
    with pytest.raises(ConfigError, match="Sawyer.*Panda"):
        read_layout("lift", {"env_args": json.dumps(args)})


def test_another_control_frequency_is_refused():
    args = json.loads(about("lift")["env_args"])
    args["env_kwargs"]["control_freq"] = 10
    with pytest.raises(ConfigError, match="control_freq 10"):
        read_layout("lift", {"env_args": json.dumps(args)})


@needs_robosuite
def test_motions_in_the_frame_of_the_base_are_turned_and_their_absolute_actions_refused():
    hands = {f"robot{arm}_{part}": n for arm in (0, 1) for part, n in robomimic.ARM_PARTS.items()}
    arrays = {name: np.ones((1, n)) for name, n in {"object": 41, **hands}.items()}
    motions = np.array([[1.0, 0, 0, 0, 0.5, 0, -1] * 2])
    given = {"task": "transport", "obs": "state", "about": about()}
    _, actions = from_recorded(arrays, motions, action_key=None, actions="delta", **given)
    expected = [[0, 1, 0, -0.5, 0, 0, -1, 0, -1, 0, 0.5, 0, 0, -1]]
    assert np.allclose(actions, expected)
    with pytest.raises(ConfigError, match="base"):
        from_recorded(arrays, motions, action_key="actions_abs", actions="absolute", **given)
    with pytest.raises(ConfigError, match="actions=absolute"):
        from_recorded(arrays, motions, action_key="actions_abs", actions="delta", **given)


@needs_robosuite
def test_a_file_of_this_version_holds_what_the_environment_showed(tmp_path):
    names = recorded("square")["state"]
    env = robomimic.RobomimicEnv("square", parts=(*names, "state"), actions="delta", reflections=True, max_steps=9)
    obs, _ = env.reset(seed=3)
    rows, states, actions = [], [], np.random.default_rng(0).uniform(-1, 1, (4, 7)).astype(np.float32)
    for action in actions:
        states.append(env.simulation.sim.get_state().flatten())
        rows.append(obs)
        obs, *_ = env.step(action)
    with h5py.File(tmp_path / "own.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["states"] = actions.astype(np.float64), np.stack(states)
        for name in names:
            demo[f"obs/{name}"] = np.stack([row[name] for row in rows]).astype(np.float64)
        file["data"].attrs["env_args"] = about("square", version="1.5.2", input_ref_frame="world")["env_args"]
    demos = read_demos(tmp_path / "own.hdf5", {name: name for name in names})
    arrays = {name: values.numpy() for name, values in demos.obs.items()}
    read, motions = resolve_env("robomimic:square").from_recorded(
        arrays, demos.actions.numpy(), {"obs": "state", "about": demos.about, "action_key": None, "actions": "delta"}
    )
    assert np.array_equal(read["state"], np.stack([row["state"] for row in rows]))
    assert np.array_equal(motions, actions)
    again, _ = env.reset(options={"reset_to_state": states[0]})
    assert np.allclose(again["state"], rows[0]["state"], atol=1e-5)
    for row, action in zip(rows[1:], actions[:-1], strict=True):
        again, *_ = env.step(action)
        assert np.abs(again["state"] - row["state"]).max() < 0.02
    env.close()


@needs_robosuite
def test_invalid_states_and_models_are_refused():
    env = robomimic.build("lift")
    (state, _, model), *_ = states("lift")
    for options, message in [
        ({"reset_to_state": state[0][:5], "model_file": model}, "shape"),
        ({"reset_to_state": state[0] * np.nan, "model_file": model}, "finite"),
        ({"reset_to_state": state[0]}, "needs model_file"),
        ({"reset_to_state": state[0], "model_file": "<mujoco"}, "no XML"),
        ({"reset_to_state": state[0], "model_file": "<mujoco/>"}, "0 bodies"),
        ({"reset_to_state": state[0], "model_file": '<!DOCTYPE a [<!ENTITY b "c">]><mujoco/>'}, "entities"),
        (
            {"reset_to_state": state[0], "model_file": "<m><body name='cube_main'><include file='/x'/></body></m>"},
            "inc",
        ),
        ({"reset_to_state": state[0], "model_file": "<m><body name='cube_main'><geom file='/x'/></body></m>"}, "geom"),
        (
            {"reset_to_state": state[0], "model_file": "<m><body name='cube_main'/></m>"},
            "no geom cube_g0, geom cube_g0_vis, joint cube_joint0, site cube_default_site",
        ),
        (
            {
                "reset_to_state": state[0],
                "model_file": model.replace('name="cube_joint0" type="free"', 'name="cube_joint0" type="hinge"'),
            },
            "joints",
        ),
        (
            {"reset_to_state": state[0], "model_file": model.replace('material="cube_redwood_mat"', 'material="gold"')},
            "MuJoCo refuses",
        ),
        ({"seat": 3}, "seat"),
    ]:
        with pytest.raises(ConfigError, match=message):
            env.reset(options=options)
    env.reset(seed=0)  # the environment works after a refusal
    env.step(np.zeros(7, dtype=np.float32))
    env.reset(options={"reset_to_state": state[0], "model_file": model})
    env.close()
