"""DeepMind Control: names, states, images. Needs the extra `dmc`; images need OpenGL."""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from difftori.envs import dmc
from difftori.envs.base import RenderingError, env_spec
from difftori.errors import ConfigError
from difftori.paper.numbers import paper_tasks
from difftori.registry import make_env

pytest.importorskip("dm_control", reason="the extra dmc is not installed: pip install 'difftori[dmc]'")
PAPER = [(task.task, task.action_repeat) for task in paper_tasks()]


@pytest.fixture
def make():
    """`make_env` that closes what it made, and skips where no image can be drawn."""
    opened = []

    def build(task: str, **options):
        try:
            opened.append(make_env(f"dmc:{task}", **{"num_envs": 1, "seed": 0, **options}))
        except RenderingError as error:
            pytest.skip(f"no OpenGL here: {error}")
        return opened[-1]

    yield build
    for env in opened:
        env.close()


def frames(env) -> np.ndarray:
    try:
        return env.render()[0]
    except RenderingError as error:
        pytest.skip(f"no OpenGL here: {error}")


def test_every_task_of_the_suite_but_lqr_has_a_name():
    theirs = {(domain, task) for domain, task in dmc._suite(needs_images=False).ALL_TASKS if domain != "lqr"}
    assert set(dmc.PARTS.values()) == theirs
    assert len(dmc.PARTS) == len(theirs) == 49


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("", "cheetah-run"),
        ("cup-catch", "ball-in-cup-catch"),
        ("cup_catch", "ball-in-cup-catch"),
        ("ball_in_cup-catch", "ball-in-cup-catch"),
        ("cartpole-swingup_sparse", "cartpole-swingup-sparse"),
        ("humanoid_CMU-run", "humanoid-cmu-run"),
    ],
)
def test_names_are_read_with_tolerance(written, meant):
    assert dmc.full_name(written) == meant


def test_a_slip_of_the_pen_gets_a_suggestion():
    with pytest.raises(ConfigError, match="'chetah-run' is unknown.*perhaps you meant 'cheetah-run'"):
        make_env("dmc:chetah-run", num_envs=1, seed=0)


@pytest.mark.parametrize(("task", "repeat"), PAPER)
def test_the_papers_tasks_run_with_its_action_repeat(make, task, repeat):
    env = make(task)
    spec = env_spec(env)
    assert (spec.action_repeat, spec.max_episode_steps, spec.max_agent_steps) == (repeat, 1000, 1000 // repeat)
    assert (spec.obs_dtype, len(spec.obs_shape)) == ("float32", 1)
    env.reset()
    assert env.step(env.action_space.sample())[0].shape == (1, *spec.obs_shape)


def test_an_unnamed_task_takes_two_steps_at_a_time(make):
    assert env_spec(make("hopper-hop")).action_repeat == 2
    assert env_spec(make("hopper-hop", action_repeat=5)).action_repeat == 5


@pytest.mark.slow
@pytest.mark.parametrize("task", dmc.TASKS)
def test_every_task_runs_to_its_end_and_repeats_itself(make, task):
    """The last of 1000 steps truncates, unless the task terminates; replay after it equals the first play."""
    env, returns = make(task, action_repeat=40), []
    for _ in range(2):
        rng = np.random.default_rng(0)
        env.reset(seed=[3])
        rewards, flags = [], (False, False)
        while not any(flags):
            _, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            rewards.append(reward[0])
            flags = terminated[0], truncated[0]
        returns.append(rewards)
        assert len(rewards) == 25
        assert flags == (False, True)
    assert returns[0] == returns[1]


def test_the_single_environment_passes_gymnasiums_check():
    env = dmc.DmcEnv("cheetah-run", obs="state", action_repeat=2, render="default")
    with warnings.catch_warnings():
        # It warns of unbounded observations, which these are, and of being built without gymnasium.make.
        warnings.simplefilter("ignore")
        check_env(env, skip_render_check=True)
    env.close()


def test_states_and_summed_rewards_are_dm_controls(make):
    suite = dmc._suite(needs_images=False)
    env = make("walker-walk", action_repeat=3)
    env.reset(seed=[4])
    reference = suite.load("walker", "walk", task_kwargs={"random": 0})
    inner = env._env._workers[0]._env.unwrapped
    reference.reset()
    with reference.physics.reset_context():
        reference.physics.data.qpos[:] = inner._env.physics.data.qpos
    action = np.linspace(-1, 1, 6)
    observations, rewards, *_ = env.step(action[None])
    steps = [reference.step(action) for _ in range(3)]
    state = np.concatenate([np.ravel(v) for v in steps[-1].observation.values()])
    assert np.allclose(observations[0], state, atol=1e-4)
    assert rewards[0] == pytest.approx(sum(step.reward for step in steps), abs=1e-5)


def test_actions_are_rescaled_to_the_tasks_own_bounds(make):
    env = make("quadruped-walk")
    env.reset()
    env.step(np.ones((1, 12)))
    inner = env._env._workers[0]._env.unwrapped
    assert np.allclose(inner._env.physics.control(), inner._env.action_spec().maximum)
    assert inner._env.action_spec().maximum.max() > 1.0


def test_truncation_after_a_thousand_steps_and_no_termination(make):
    env = make("pendulum-swingup", action_repeat=300)
    env.reset()
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(4)]
    assert [bool(truncated[0]) for _, truncated in ends] == [False, False, False, True]
    assert not any(terminated[0] for terminated, _ in ends)


def test_images_are_stacked_newest_last_and_the_first_stands_for_those_before(make):
    env = make("cheetah-run", obs="pixels", num_envs=2)
    assert env.observation_space.shape == (2, 9, 84, 84)
    first, _ = env.reset()
    assert first.dtype == np.uint8
    assert np.array_equal(first[:, :3], first[:, 6:])
    assert first.std() > 10
    second = env.step(env.action_space.sample())[0]
    third = env.step(env.action_space.sample())[0]
    assert np.array_equal(second[:, :6], first[:, 3:])
    assert np.array_equal(third[:, :6], second[:, 3:])
    assert not np.array_equal(third[:, 6:], second[:, 6:])


def test_images_of_an_episode_are_repeated_by_its_seed(make):
    first, second = (make("cartpole-swingup", obs="pixels", seed=seed) for seed in (1, 2))
    assert np.array_equal(first.reset(seed=[9])[0], second.reset(seed=[9])[0])
    for _ in range(3):
        action = first.action_space.sample()
        assert np.array_equal(first.step(action)[0], second.step(action)[0])


def test_fast_images_differ_a_little_and_states_not_at_all(make):
    default, fast = (make("cheetah-run", obs="pixels", render=render) for render in ("default", "fast"))
    one, other = (env.reset(seed=[1])[0].astype(float) for env in (default, fast))
    assert 0 < np.abs(one - other).mean() < 5
    action = default.action_space.sample()
    assert default.step(action)[1] == fast.step(action)[1]


def test_films_are_larger_frames_of_the_same_state(make):
    env = make("cheetah-run")
    env.reset()
    frame = frames(env)
    assert (frame.shape, frame.dtype) == ((240, 320, 3), np.uint8)
    env.step(env.action_space.sample())


def test_warp_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="mujoco-warp needs a newer MuJoCo"):
        make_env("dmc:cheetah-run", num_envs=1, seed=0, obs="pixels", render="warp")


def test_every_fault_is_listed():
    with pytest.raises(ConfigError) as caught:
        make_env("dmc:cheetah-run", num_envs=1, seed=0, obs="sound", render="slow", action_repeat=0)
    assert len(caught.value.faults) == 3


def test_without_opengl_the_message_names_the_packages(monkeypatch):
    dmc._suite(needs_images=False)
    monkeypatch.setenv("MUJOCO_GL", "off")
    with pytest.raises(RenderingError, match="apt-get install libegl1"):
        make_env("dmc:cheetah-run", num_envs=1, seed=0, obs="pixels")
    make_env("dmc:cheetah-run", num_envs=1, seed=0).close()
