"""ManiSkill: names, clouds, success, the planner. What needs the simulator needs the extra `maniskill` and Vulkan."""

import sys

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from difftori.collection.play import play
from difftori.envs import maniskill, maniskill_simulation
from difftori.envs.base import RenderingError
from difftori.envs.maniskill_cloud import policy_cloud, rotation
from difftori.envs.maniskill_names import ROBOTS
from difftori.envs.workers import launch
from difftori.errors import ConfigError, DataError, MissingExtraError
from difftori.registry import make_env, resolve_env


def opened(build):
    """What `build` returns, or a skip where ManiSkill or Vulkan is missing."""
    try:
        return build()
    except (MissingExtraError, RenderingError) as error:
        pytest.skip(str(error))


@pytest.fixture
def make():
    made = []

    def build(task: str, **options):
        made.append(opened(lambda: make_env(f"maniskill:{task}", **{"num_envs": 1, "seed": 0, **options})))
        return made[-1]

    yield build
    for env in made:
        env.close()


@pytest.mark.parametrize("written", ["PickCube", "PickCube-v1", "pick-cube", "pick_cube", "pickcube", ""])
def test_names_are_read_with_tolerance(written):
    assert resolve_env(f"maniskill:{written}").name == "maniskill:PickCube"


def test_a_slip_of_the_pen_gets_a_suggestion():
    with pytest.raises(ConfigError, match="perhaps you meant 'PickCube'"):
        make_env("maniskill:PikCube", num_envs=1, seed=0)


def test_the_quaternion_is_w_x_y_z():
    quarter = rotation(np.array([np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5)]))
    assert np.allclose(quarter @ [1, 0, 0], [0, 1, 0])


def scene(count: int = 4000):
    rng = np.random.default_rng(0)
    xyzw = np.concatenate([rng.uniform(0.01, 1, (count, 3)), np.ones((count, 1))], axis=1).astype(np.float32)
    xyzw[::2, 2] = 0.0005  # the table
    xyzw[1::4, 3] = 0  # nothing was hit
    return xyzw, rng.integers(0, 256, (count, 3)).astype(np.uint8)


def test_a_cloud_holds_scene_and_goal_in_the_frame_of_the_tool():
    xyzw, rgb = scene()
    tcp = np.array([0.3, -0.2, 0.5, np.sqrt(0.5), np.sqrt(0.5), 0.0, 0.0])
    goal = np.array([0.1, 0.2, 0.3])
    cloud = policy_cloud(xyzw, rgb, tcp, goal, np.random.default_rng(1))
    assert (cloud.shape, cloud.dtype) == ((1200, 6), np.float32)
    world = cloud[:, :3] @ rotation(tcp[3:]).T + tcp[:3]
    seen = xyzw[(xyzw[:, 3] > 0) & (xyzw[:, 2] > 0.001)]
    gaps = np.abs(world[:1150, None] - seen[None, :, :3]).max(-1).min(1)
    assert gaps.max() < 1e-5
    assert len(seen) < 1150  # so some are drawn again
    assert np.abs(world[1150:] - goal).max() < 0.0201
    assert (cloud[1150:, 3:] == [0, 1, 0]).all()
    assert 0 <= cloud[:, 3:].min() <= cloud[:, 3:].max() == 1
    assert np.array_equal(cloud, policy_cloud(xyzw, rgb, tcp, goal, np.random.default_rng(1)))


def test_without_a_goal_all_points_are_of_the_scene_and_an_empty_one_is_refused():
    xyzw, rgb = scene(40_000)
    tcp = np.array([0.0, 0, 0, 1, 0, 0, 0])
    cloud = policy_cloud(xyzw, rgb, tcp, None, np.random.default_rng(1))
    assert len(np.unique(cloud, axis=0)) == 1200
    with pytest.raises(DataError, match="above the ground"):
        policy_cloud(xyzw[::2], rgb[::2], tcp, None, np.random.default_rng(1))


def test_without_vulkan_two_commands_are_named(monkeypatch):
    class Gymnasium:
        @staticmethod
        def make(*_, **__):
            raise RuntimeError("vk::createInstanceUnique: ErrorIncompatibleDriver")

    monkeypatch.setattr(maniskill_simulation, "_maniskill", lambda: Gymnasium)
    with pytest.raises(RenderingError, match="Fix: .*apt-get install.*make vulkan"):
        make_env("maniskill:PickCube", num_envs=1, seed=0)


def test_other_errors_of_the_simulator_pass(monkeypatch):
    class Gymnasium:
        @staticmethod
        def make(*_, **__):
            raise RuntimeError("out of chairs")

    monkeypatch.setattr(maniskill_simulation, "_maniskill", lambda: Gymnasium)
    with pytest.raises(RuntimeError, match="out of chairs"):
        maniskill.build("PickCube")


def test_later_pythons_cannot_have_the_extra(monkeypatch):
    monkeypatch.setattr(maniskill_simulation.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(maniskill_simulation, "PYTHON_END", sys.version_info[:2])
    with pytest.raises(MissingExtraError, match="needs Python 3.10 or 3.11, and this is 3.*Fix: create an environment"):
        maniskill.build("PickCube")


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setattr(maniskill_simulation.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(maniskill_simulation, "PYTHON_END", (4, 0))
    with pytest.raises(MissingExtraError, match=r"pip install 'difftori\[maniskill\]'"):
        maniskill.build("PickCube")


@pytest.mark.parametrize(("option", "value"), [("obs", "pixels"), ("max_steps", 0)])
def test_options_are_checked_before_the_simulator_is_loaded(option, value):
    with pytest.raises(ConfigError, match=f"{option} is"):
        make_env("maniskill:PickCube", num_envs=1, seed=0, **{option: value})


def test_only_planned_tasks_have_an_expert(monkeypatch):
    monkeypatch.setattr(maniskill, "PLANNED", ())
    with pytest.raises(ConfigError, match="PickCube has no expert"):
        resolve_env("maniskill:PickCube").make_expert("state")


@pytest.mark.filterwarnings("ignore::UserWarning")  # it warns of unbounded observations
def test_the_single_environment_passes_gymnasiums_check():
    check_env(opened(lambda: maniskill.build("PickCube", max_steps=5)), skip_render_check=True)


def test_states_are_maniskills_and_the_limit_is_ours(make):
    env = make("PickCube", max_steps=3)
    theirs = maniskill_simulation.open_simulation("PickCube", obs_mode="state")
    raw, _ = theirs.reset(seed=4)
    ours, _ = env.reset(seed=[4])
    for step in range(3):
        assert np.array_equal(ours, raw.numpy())
        action = env.action_space.sample()
        raw, reward, *_ = theirs.step(action[0])
        ours, rewards, terminated, truncated, _ = env.step(action)
        assert rewards[0] == float(reward)
        assert (bool(terminated[0]), bool(truncated[0])) == (False, step == 2)
    theirs.close()


def test_clouds_and_their_repetition_by_seed(make):
    env = make("PickCube", obs="points")
    first, _ = env.reset(seed=[3])
    action = env.action_space.sample()
    second = env.step(action)[0]
    again, _ = env.reset(seed=[3])
    assert {name: part.shape for name, part in first.items()} == {"point_cloud": (1, 1200, 6), "agent_pos": (1, 25)}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    after = env.step(action)[0]
    assert all(np.array_equal(second[name], after[name]) for name in first)
    tool = first["agent_pos"][0, 18:21]
    assert np.abs(first["point_cloud"][0, :1150, :3]).max() < 2
    assert 0 < tool[2] < 0.5


@pytest.mark.parametrize("task", ["PushCube", "StackCube"])
def test_the_robot_decides_the_cameras(task):
    cameras = {"panda": ["base_camera"], "panda_wristcam": ["base_camera", "hand_camera"]}[ROBOTS[task]]
    env = opened(lambda: maniskill_simulation.open_simulation(task, obs_mode="pointcloud"))
    assert (env.agent.uid, list(env.scene.sensors)) == (ROBOTS[task], cameras)
    env.close()


def test_a_planned_demonstration_succeeds_and_repeats_after_others():
    expert = resolve_env("maniskill:PushCube").make_expert("state")
    copies = opened(lambda: launch(expert.build, name="maniskill", num_envs=1, seed=0))
    # In a scene that is not built again, the contacts of these seeds depended on the episodes before.
    seeds = (21218764, 333949037, 333949037, 21218764)
    episodes = list(play(copies, expert, enumerate(seeds)))
    copies.close()
    assert all(episode.success for episode in episodes)
    assert episodes[0].arrays.keys() == {"state", "action"}
    for one, other in ((0, 3), (1, 2)):
        assert all(
            np.array_equal(episodes[one].arrays[name], episodes[other].arrays[name]) for name in ("state", "action")
        )
    assert not np.array_equal(episodes[0].arrays["state"][0], episodes[1].arrays["state"][0])


def test_missing_cabinets_are_named_before_maniskill_asks_for_them(monkeypatch, tmp_path):
    opened(lambda: maniskill_simulation.open_simulation("PickCube", obs_mode="none")).close()
    from mani_skill.utils import assets

    monkeypatch.setattr(assets, "is_data_source_downloaded", lambda name: not name.endswith("/1000"))
    with pytest.raises(ConfigError, match="1 are not in .*partnet_mobility.*such as 1000. Fix: .*download_asset"):
        maniskill.build("OpenCabinetDoor")
