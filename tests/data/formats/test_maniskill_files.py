"""ManiSkill's trajectories, written here as its RecordEpisode writes them."""

import json

import h5py
import numpy as np
import pytest

from difftori.data.formats import read_demos
from difftori.envs.maniskill_cloud import policy_cloud
from difftori.errors import ConfigError, DataError
from difftori.registry import resolve_env

LENGTHS = (3, 5)
SEEDS = (11, 7)


def observations(mode: str, rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if mode == "state":
        return {"obs": rng.normal(size=(rows, 42)).astype(np.float32)}
    tcp = np.tile(np.array([0.1, 0.2, 0.3, 0.0, 1.0, 0.0, 0.0]), (rows, 1)).astype(np.float32)
    xyzw = rng.uniform(-1, 1, (rows, 3000, 4)).astype(np.float32)
    return {
        "obs/agent/qpos": rng.normal(size=(rows, 9)).astype(np.float32),
        "obs/agent/qvel": rng.normal(size=(rows, 9)).astype(np.float32),
        "obs/extra/tcp_pose": tcp,
        "obs/extra/goal_pos": rng.uniform(0, 1, (rows, 3)).astype(np.float32),
        "obs/pointcloud/xyzw": xyzw,
        "obs/pointcloud/rgb": rng.integers(0, 256, (rows, 3000, 3)).astype(np.uint8),
    }


@pytest.fixture
def write(tmp_path):
    """Writes a file and its JSON file; `change(content)` edits the latter."""

    def make(mode: str = "state", control: str = "pd_ee_delta_pose", env_id: str = "PickCube-v1", change=None):
        path, rng = tmp_path / "trajectory.h5", np.random.default_rng(0)
        with h5py.File(path, "w") as file:
            for number, length in enumerate(LENGTHS):
                file[f"traj_{number}/actions"] = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
                file[f"traj_{number}/success"] = np.ones(length, bool)
                file[f"traj_{number}/env_states/actors/cube"] = np.zeros((length + 1, 13), np.float32)
                for key, values in observations(mode, length + 1, rng).items():
                    file[f"traj_{number}/{key}"] = values
        content = {
            "env_info": {"env_id": env_id, "env_kwargs": {"obs_mode": mode, "control_mode": control}},
            "episodes": [
                {"episode_id": number, "episode_seed": seed, "control_mode": control}
                for number, seed in enumerate(SEEDS)
            ],
        }
        if change is not None:
            change(content)
        path.with_suffix(".json").write_text(json.dumps(content))
        return path

    return make


def test_a_two_armed_robot_has_no_tool_pose(write):
    path = write("pointcloud", "base_pd_joint_vel_arm_pd_joint_vel", "PushChair-v1")
    with h5py.File(path, "a") as file:
        for number in range(len(LENGTHS)):
            del file[f"traj_{number}/obs/extra/tcp_pose"], file[f"traj_{number}/obs/extra/goal_pos"]
        xyz = file["traj_0/obs/pointcloud/xyzw"][0, :, :3]
    read = read_demos(path)
    assert read.obs["agent_pos"].shape == (sum(LENGTHS), 18)
    cloud = read.obs["point_cloud"][0, :, :3].numpy()
    assert all((np.abs(xyz - point).max(1) < 1e-6).any() for point in cloud[:20]), "in world coordinates"


def test_states_are_read_without_the_observation_after_the_last_action(write):
    path = write()
    read = read_demos(path)
    assert {name: tuple(values.shape) for name, values in read.obs.items()} == {"state": (sum(LENGTHS), 42)}
    assert read.actions.shape == (sum(LENGTHS), 7)
    assert read.about == {"env_id": "PickCube-v1", "control_mode": "pd_ee_delta_pose", "obs_mode": "state"}
    with h5py.File(path) as file:
        assert np.array_equal(read.obs["state"][3:], file["traj_1/obs"][:5])
        assert np.array_equal(read.actions[:3], file["traj_0/actions"][()])


def test_clouds_are_those_that_the_environment_draws_with_the_episodes_seed(write):
    path = write("pointcloud")
    read = read_demos(path)
    assert {name: tuple(values.shape[1:]) for name, values in read.obs.items()} == {
        "point_cloud": (1200, 6),
        "agent_pos": (25,),
    }
    with h5py.File(path) as file:
        shown, draws = file["traj_1/obs"], np.random.default_rng(SEEDS[1])
        for step in range(LENGTHS[1]):
            tcp, goal = shown["extra/tcp_pose"][step], shown["extra/goal_pos"][step]
            cloud = policy_cloud(shown["pointcloud/xyzw"][step], shown["pointcloud/rgb"][step], tcp, goal, draws)
            assert np.array_equal(read.obs["point_cloud"][LENGTHS[0] + step], cloud)


def converted(path, task: str):
    read = read_demos(path)
    arrays = {name: values.numpy() for name, values in read.obs.items()}
    given = {"obs": "state" if "state" in arrays else "points", "about": read.about, "action_key": None}
    return resolve_env(f"maniskill:{task}").from_recorded(arrays, read.actions.numpy(), given)


@pytest.mark.parametrize("mode", ["state", "pointcloud"])
def test_demonstrations_of_the_task_are_converted(write, mode):
    path = write(mode, env_id="PegInsertionSide-v1", change=robots("panda_wristcam"))
    entries, actions = converted(path, "PegInsertionSide")
    assert set(entries) == ({"state"} if mode == "state" else {"point_cloud", "agent_pos"})
    assert np.array_equal(actions, read_demos(path).actions.numpy())
    converted(write(mode), "PickCube")


@pytest.mark.parametrize("mode", ["state", "pointcloud"])
def test_demonstrations_of_another_task_are_refused(write, mode):
    with pytest.raises(ConfigError, match="name 'maniskill:PushCube', not maniskill:PickCube. Fix"):
        converted(write(mode, env_id="PushCube-v1"), "PickCube")


def robots(value):
    """Returns a change of the JSON file that names the robot."""
    return lambda content: content["env_info"]["env_kwargs"].update(robot_uids=value)


@pytest.mark.parametrize("value", ["xarm6_robotiq", ["xarm6_robotiq"]])
def test_demonstrations_of_another_robot_are_refused(write, value):
    path = write(change=robots(value))
    assert read_demos(path).about["robot_uids"] == "xarm6_robotiq"
    with pytest.raises(ConfigError, match="robot 'xarm6_robotiq', but maniskill:PickCube has 'panda'. Fix"):
        converted(path, "PickCube")


@pytest.mark.parametrize("about", [{"env": "maniskill:StackCube"}, {"env": "metaworld:assembly"}, {}])
def test_collected_sets_of_another_task_are_refused(about):
    arrays, actions = {"state": np.zeros((2, 42), np.float32)}, np.zeros((2, 7), np.float32)
    env = resolve_env("maniskill:PickCube")
    env.from_recorded(arrays, actions, {"obs": "state", "about": {"env": "maniskill:PickCube"}})
    found = about.get("env", "no environment")
    with pytest.raises(ConfigError, match=f"name '{found}', not maniskill:PickCube. Fix"):
        env.from_recorded(arrays, actions, {"obs": "state", "about": about})


def test_some_episodes_only(write):
    assert read_demos(write(), episodes=["1"]).actions.shape == (LENGTHS[1], 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"change": lambda content: content["env_info"]["env_kwargs"].update(robot_uids=3)},
            "not ManiSkill's description",
        ),
        ({"control": "pd_joint_pos"}, "actions are pd_joint_pos.*mani_skill.trajectory.replay_trajectory.*physx_cpu"),
        (
            {"control": "pd_joint_pos", "env_id": "Pour-v0"},
            "actions are pd_joint_pos.*mani_skill2.trajectory.replay_trajectory",
        ),
        ({"control": "pd_joint_vel"}, "Fix: give demonstrations in pd_ee_delta_pose or pd_joint_pos"),
        ({"mode": "none"}, "observations are 'none'.*replay_trajectory"),
        ({"env_id": "PickCube-v0"}, "is of ManiSkill 2"),
        ({"change": lambda content: content.pop("env_info")}, "not ManiSkill's description"),
        ({"change": lambda content: content["episodes"].clear()}, "lists no episodes"),
        ({"change": lambda content: content["episodes"][1].update(episode_id=5)}, "traj_5 does not exist"),
        ({"change": lambda content: content["episodes"][0].update(episode_seed=-1)}, "has the seed -1"),
    ],
)
def test_other_files_are_refused_with_the_fix(write, arguments, message):
    mode = arguments.get("mode", "state")
    path = write(**{**arguments, "mode": "state"}) if mode == "none" else write(**arguments)
    if mode == "none":
        beside = path.with_suffix(".json")
        beside.write_text(beside.read_text().replace('"obs_mode": "state"', '"obs_mode": "none"'))
    with pytest.raises(DataError, match=message):
        read_demos(path)


def test_the_json_file_is_needed(write):
    path = write()
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="there is no trajectory.json beside it"):
        read_demos(path)


def test_lists_of_demonstrations_are_robomimics(write):
    with pytest.raises(DataError, match="neither tasks nor lists of demonstrations"):
        read_demos(write(), subset="train")


def drop(file):
    del file["traj_1/obs"]


def link(file):
    drop(file)
    file["traj_1/obs"] = h5py.ExternalLink("other.h5", "/obs")


def objects(file):
    drop(file)
    file["traj_1"].create_dataset("obs", (6,), dtype=h5py.string_dtype())


def short(file):
    drop(file)
    file["traj_1/obs"] = np.zeros((2, 42))


def nan(file):
    file["traj_1/obs"][2, 3] = np.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "obs does not exist"),
        (link, "links are not followed"),
        (objects, "objects never"),
        (short, "has 2 steps, but its actions 5"),
        (nan, "holds nan at step 5"),
    ],
)
def test_damaged_files_are_refused_with_the_place(write, damage, message):
    path = write()
    with h5py.File(path, "a") as file:
        damage(file)
    with pytest.raises(DataError, match=message) as caught:
        read_demos(path)
    assert "trajectory.h5" in str(caught.value)


@pytest.mark.parametrize("key", ["obs", "env_states", "actions"])
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("kind", ["external", "soft"])
def test_links_are_refused_also_if_they_lead_nowhere(write, tmp_path, key, exists, kind):
    path = write()
    with h5py.File(tmp_path / "other.h5", "w") as other:
        if exists:
            other["array"] = np.zeros((4, 42), np.float32)
    with h5py.File(path, "a") as file:
        del file[f"traj_0/{key}"]
        target = "traj_1/actions" if exists else "nothing"
        link = h5py.ExternalLink("other.h5", "/array") if kind == "external" else h5py.SoftLink(f"/{target}")
        file[f"traj_0/{key}"] = link
    with pytest.raises(DataError, match=f"traj_0/{key} is a .*Link.*links are not followed"):
        read_demos(path)


def test_a_truncated_file_is_refused(write):
    path = write()
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match="truncated or damaged"):
        read_demos(path)
