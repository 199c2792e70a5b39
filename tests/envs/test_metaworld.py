"""MetaWorld: names, states, success, point clouds, experts. Needs the extra `metaworld`; clouds need OpenGL."""

import importlib.util

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from difftori.envs import metaworld
from difftori.envs.base import RenderingError, env_spec
from difftori.envs.metaworld_camera import HIGH, LOW, TILT
from difftori.envs.point_cloud import tilt
from difftori.envs.workers import launch
from difftori.errors import ConfigError, MissingExtraError
from difftori.registry import make_env, resolve_env

needs_metaworld = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None, reason="needs the extra: pip install 'difftori[metaworld]'"
)


@pytest.fixture
def make():
    """`make_env` that closes what it made, and skips where no image can be drawn."""
    opened = []

    def build(task: str, **options):
        opened.append(make_env(f"metaworld:{task}", **{"num_envs": 1, "seed": 0, **options}))
        if options.get("obs") == "points":
            shown(opened[-1].reset)
        return opened[-1]

    yield build
    for env in opened:
        env.close()


def shown(draw):
    """What `draw` returns, or a skip."""
    try:
        return draw()
    except RenderingError as error:
        pytest.skip(f"no OpenGL here: {error}")


def inner(env):
    """MetaWorld's own environment in there."""
    return env._env._workers[0]._env.unwrapped._env


def in_camera(simulation, point: np.ndarray) -> np.ndarray:
    """A point of the world where a cloud has it."""
    camera = simulation.model.camera("corner2").id
    turned = simulation.data.cam_xmat[camera].reshape(3, 3).T @ (point - simulation.data.cam_xpos[camera])
    return tilt(*TILT) @ turned


def distance(cloud: np.ndarray, point: np.ndarray) -> float:
    return float(np.linalg.norm(cloud - point, axis=1).min())


@needs_metaworld
def test_tasks_are_metaworlds_and_the_papers_come_first():
    known = metaworld.import_drawing("metaworld.env_dict", needs_images=False).ALL_V3_ENVIRONMENTS
    assert {f"{task}-v3" for task in metaworld.TASKS} == set(known)
    assert len(metaworld.TASKS) == 50
    assert len(metaworld.PAPER_TASKS) == 22


@pytest.mark.parametrize("written", ["assembly", "assembly-v3", "Assembly_v3", "assembly-v3-goal-observable"])
def test_names_are_read_with_tolerance(written):
    assert metaworld.full_name(written) == "assembly"


def test_a_slip_of_the_pen_gets_a_suggestion():
    with pytest.raises(ConfigError, match="'asembly' is unknown.*perhaps you meant 'assembly'"):
        make_env("metaworld:asembly", num_envs=1, seed=0)


@needs_metaworld
@pytest.mark.filterwarnings("ignore::UserWarning")  # it warns of unbounded observations
def test_the_single_environment_passes_gymnasiums_check():
    check_env(metaworld.MetaworldEnv("reach", parts=None, max_steps=5), skip_render_check=True)


@needs_metaworld
def test_states_and_rewards_are_metaworlds_whatever_came_before(make):
    known = metaworld.import_drawing("metaworld.env_dict", needs_images=False)
    reference = known.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE["push-v3-goal-observable"](seed=1)
    reference._freeze_rand_vec, reference.seeded_rand_vec = False, True
    reference.seed(11)
    env = make("push")
    env.reset(seed=[5])
    for _ in range(5):
        env.step(env.action_space.sample())
    theirs, ours = reference.reset()[0], env.reset(seed=[11])[0]
    rng = np.random.default_rng(0)
    for _ in range(60):
        assert np.array_equal(ours[0], theirs.astype(np.float32))
        action = rng.uniform(-1, 1, 4).astype(np.float32)
        theirs, reward, *_ = reference.step(action)
        ours, rewards, *_ = env.step(action[None])
        assert rewards[0] == pytest.approx(reward, abs=1e-9)


@needs_metaworld
def test_each_episode_has_a_goal_of_its_own_and_time_is_up_after_200_steps(make):
    env = make("reach", num_envs=2)
    assert env_spec(env).max_episode_steps == 200
    first, again = env.reset(seed=[1, 2])[0], env.reset()[0]
    goals = np.concatenate([first, again])[:, -3:]
    assert len(np.unique(goals, axis=0)) == 4
    flags = [env.step(np.zeros((2, 4)))[2:4] for _ in range(200)]
    assert not any(terminated.any() for terminated, _ in flags)
    assert [truncated.all() for _, truncated in flags] == [False] * 199 + [True]


@needs_metaworld
def test_the_expert_succeeds_and_a_success_that_is_undone_stays_one():
    expert = metaworld.expert("stick-push", obs="state")
    env = launch(expert.build, name="stick-push", num_envs=2, seed=0)
    seen, info = env.reset(seed=[0, 1])
    assert not info["success"].any()
    told, momentary = [], []
    for _ in range(200):
        seen, _, _, truncated, info = env.step(np.clip(expert.act(seen), -1, 1))
        told.append(info["success"].copy())
        workers = env._env._workers
        momentary.append(
            [w._env._env.evaluate_state(w._env._env._last_stable_obs, np.zeros(4))[1]["success"] for w in workers]
        )
    assert truncated.all()
    assert np.array_equal(told, np.logical_or.accumulate(np.array(momentary) > 0))
    assert told[-1].all()
    assert (np.array(momentary)[-1] == 0).any()
    env.close()


@needs_metaworld
def test_a_demonstration_shows_what_dp3_stores():
    expert = metaworld.expert("reach", obs="state")
    env = launch(expert.build, name="reach", num_envs=1, seed=0)
    seen, _ = env.reset()
    assert {stored: seen[name].shape for stored, name in expert.arrays.items()} == {
        "state": (1, 9),
        "full_state": (1, 39),
    }
    env.close()
    assert set(metaworld.expert("reach").arrays) == {"state", "full_state", "point_cloud"}


@needs_metaworld
def test_clouds_are_cropped_repeatable_and_show_the_hand(make):
    env = make("assembly", obs="points")
    with pytest.raises(ConfigError, match="choose another obs"):
        env_spec(env)
    seen, _ = env.reset(seed=[3])
    again, _ = env.reset(seed=[3])
    cloud = seen["point_cloud"][0]
    assert (cloud.shape, seen["agent_pos"].shape) == ((512, 3), (1, 9))
    assert len(np.unique(cloud, axis=0)) == 512
    assert (cloud > LOW).all()
    assert (cloud < HIGH).all()
    assert all(np.array_equal(seen[name], again[name]) for name in seen)
    seen = env.step(np.array([[0.5, 0.5, -1.0, 1.0]]))[0]
    assert not np.array_equal(seen["point_cloud"], again["point_cloud"])
    hand = seen["agent_pos"][0, :3]
    assert np.allclose(hand, inner(env).get_endeff_pos())
    assert distance(seen["point_cloud"][0], in_camera(inner(env), hand)) < 0.06


@needs_metaworld
def test_height_in_the_cloud_is_the_worlds_less_the_cameras(make):
    """It is to be vertical; the camera stands at 0.8 m, and DP3's angles are right to a centimetre."""
    env = make("assembly", obs="points")
    for point in ([0.0, 0.6, 0.0], [0.2, 0.8, 0.3], [-0.3, 0.5, 0.1]):
        assert in_camera(inner(env), np.array(point))[2] == pytest.approx(point[2] - 0.8, abs=0.015)


@needs_metaworld
@pytest.mark.parametrize("steps", [0, 2])
def test_goal_markers_are_drawn_where_the_goal_is(make, steps):
    """This one hangs in the air, and MetaWorld's own step leaves it half a metre away."""
    env = make("disassemble", obs="points")
    seen, _ = env.reset(seed=[11])
    for _ in range(steps):
        seen = env.step(np.zeros((1, 4)))[0]
    assert distance(seen["point_cloud"][0], in_camera(inner(env), inner(env)._target_pos)) < 0.02


@needs_metaworld
def test_drawing_changes_nothing_else(make):
    blind = make("assembly")
    seeing = launch(metaworld.expert("assembly").build, name="assembly", num_envs=1, seed=0)
    state, seen = blind.reset(seed=[4])[0], shown(lambda: seeing.reset(seed=[4]))[0]
    for _ in range(5):
        assert np.array_equal(state, seen["state"])
        action = np.array([[0.3, -0.2, -1.0, 0.5]])
        state, seen = blind.step(action)[0], seeing.step(action)[0]
    seeing.close()


@needs_metaworld
def test_films_are_larger_upright_frames(make):
    env = make("assembly")
    env.reset(seed=[0])
    frame = shown(env.render)[0]
    assert (frame.shape, frame.dtype) == ((240, 240, 3), np.uint8)
    assert frame.std() > 10
    # The table is of wood and fills the lower part; the arm, which is red, reaches down from above.
    red = (frame[..., 0] > 120) & (frame[..., 1] < 60)
    assert red[:120].sum() > red[120:].sum()


def test_every_fault_is_listed():
    with pytest.raises(ConfigError) as caught:
        make_env("metaworld:reach", num_envs=1, seed=0, obs="sound", max_steps=501)
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match="sound"):
        metaworld.expert("reach", obs="sound")


def test_a_missing_extra_is_named(monkeypatch):
    env = resolve_env("metaworld:reach")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"difftori\[metaworld\]"):
        env.make(num_envs=1, seed=0)


@needs_metaworld
def test_options_are_refused_and_cost_nothing(make):
    env = make("reach")
    env.reset()
    with pytest.raises(ConfigError, match="takes none"):
        env.reset(options={"colour": "red"})
    env.step(np.zeros((1, 4)))


@needs_metaworld
@pytest.mark.slow
@pytest.mark.parametrize("task", metaworld.TASKS)
def test_every_task_runs_to_its_end_and_repeats_itself(make, task):
    env, twin = make(task, max_steps=60), make(task, max_steps=60)
    twin.reset(seed=[1])
    for _ in range(20):
        twin.step(np.array([[0.0, 0.3, -1.0, 1.0]]))
    env.action_space.seed(0)
    ours, theirs = env.reset(seed=[3])[0], twin.reset(seed=[3])[0]
    for step in range(60):
        assert np.array_equal(ours, theirs)
        action = env.action_space.sample()
        ours, _, _, truncated, _ = env.step(action)
        theirs = twin.step(action)[0]
        assert truncated[0] == (step == 59)
