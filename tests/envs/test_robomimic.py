"""Robomimic: tasks, observations, seeds. Needs the extra `robomimic`; images need OpenGL."""

import importlib.util
import os

import numpy as np
import pytest

from difftori.envs import robomimic
from difftori.envs.robomimic_simulation import TASKS, import_robosuite
from difftori.errors import ConfigError, MissingExtraError
from difftori.registry import make_env, resolve_env

needs_robosuite = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="needs the extra: pip install 'difftori[robomimic]'"
)
LOW_DIM = {"lift": 19, "can": 23, "square": 23, "transport": 59, "tool_hang": 53}


def made(task: str, **options) -> robomimic.RobomimicEnv:
    return robomimic.build(task, **options)


def random_episode(env: robomimic.RobomimicEnv, seed: int, steps: int) -> np.ndarray:
    """The simulator's states of an episode of random actions that depend on the seed."""
    env.reset(seed=seed)
    states = [env.simulation.sim.get_state().flatten()]
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        env.step(draw.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        states.append(env.simulation.sim.get_state().flatten())
    return np.stack(states)


@needs_robosuite
@pytest.mark.parametrize("task", TASKS)
def test_the_seed_and_the_actions_determine_an_episode_whatever_came_before(task):
    env, twin = made(task), made(task)
    first = random_episode(env, 3, 10)
    other = random_episode(env, 4, 3)
    again, elsewhere = random_episode(env, 3, 10), random_episode(twin, 3, 10)
    assert np.array_equal(first, again)
    assert np.array_equal(first, elsewhere)
    assert not np.array_equal(first[0], other[0])
    env.close()
    twin.close()


@needs_robosuite
@pytest.mark.parametrize("task", TASKS)
def test_the_state_is_the_low_dimensional_observation_of_robomimic(task):
    env = made(task)
    obs, _ = env.reset(seed=0)
    seen = env.simulation._get_observations(force_update=True)
    arms = TASKS[task].arms
    names = [f"robot{arm}_{part}" for arm in range(arms) for part in ("eef_pos", "eef_quat", "gripper_qpos")]
    assert obs.shape == env.observation_space.shape == (LOW_DIM[task],)
    assert np.allclose(obs, np.concatenate([seen["object-state"], *(seen[name] for name in names)]), atol=1e-6)
    env.close()


@needs_robosuite
def test_the_first_observation_has_the_positions_relative_to_the_hand():
    env = made("square")
    first, _ = env.reset(seed=0)
    seen = env.simulation._get_observations(force_update=True)
    assert np.allclose(first[:3], seen["SquareNut_to_robot0_eef_pos"], atol=1e-6)
    assert np.abs(first[:3]).max() > 0.01
    env.close()


@needs_robosuite
@pytest.mark.filterwarnings("ignore::UserWarning")  # it warns of unbounded observations
def test_it_is_a_gymnasium_environment():
    from gymnasium.utils.env_checker import check_env

    check_env(made("lift", max_steps=5), skip_render_check=True)


@needs_robosuite
def test_episodes_are_truncated_at_the_limit_and_success_is_reported_at_every_step():
    env = made("can", max_steps=3)
    assert env.reset(seed=0)[1] == {"success": False}
    ends = [env.step(np.zeros(7, dtype=np.float32)) for _ in range(3)]
    assert [(end[1], end[2], end[3], end[4]) for end in ends] == [
        (0.0, False, last, {"success": False}) for last in (False, False, True)
    ]
    assert made("transport").metadata["max_episode_steps"] == 700
    env.close()


@needs_robosuite
def test_success_remains_reported_after_the_first(monkeypatch):
    env = made("square", max_steps=9)
    env.reset(seed=0)
    solved = iter([False, True, False])
    monkeypatch.setattr(env.simulation, "_check_success", lambda: next(solved))
    monkeypatch.setattr(env.simulation, "reward", lambda action: 0.0)
    steps = [env.step(np.zeros(7, dtype=np.float32)) for _ in range(3)]
    assert [step[1] for step in steps] == [0.0, 1.0, 0.0]
    assert [step[4]["success"] for step in steps] == [False, True, True]
    env.close()


@needs_robosuite
def test_import_keeps_the_selected_backend_of_mujoco(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    import_robosuite(needs_images=False)
    assert os.environ["MUJOCO_GL"] == "disable"


@pytest.mark.parametrize("written", ["tool_hang", "tool-hang", "Tool-Hang"])
def test_spellings_of_a_task_are_the_same_task(written):
    assert resolve_env(f"robomimic:{written}").name == "robomimic:tool_hang"


def test_invalid_options_are_listed_together():
    with pytest.raises(ConfigError) as error:
        made("square", obs="sound", max_steps=0)
    assert len(error.value.faults) == 2


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"difftori\[robomimic\]"):
        made("square")


def test_near_names_are_suggested():
    with pytest.raises(ConfigError, match="square"):
        make_env("robomimic:sqare", num_envs=1, seed=0)
