"""The probes against their equations and their known returns."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from difftori.envs.base import env_spec
from difftori.envs.probe import OPTIMAL_RETURN, RANDOM_RETURN, STEPS, TASKS, ProbeEnv, optimal_action
from difftori.errors import ConfigError
from difftori.registry import make_env


def returns(task: str, act, *, rows: int, seed: int = 0) -> np.ndarray:
    """Undiscounted returns of one episode per row."""
    env = make_env(f"probe:{task}", num_envs=rows, seed=seed)
    observations, _ = env.reset()
    total = np.zeros(rows)
    for step in range(STEPS[task]):
        observations, rewards, terminated, truncated, _ = env.step(act(observations))
        total += rewards
        assert not truncated.any()
        assert terminated.all() == (step == STEPS[task] - 1) == terminated.any()
    return total


@pytest.mark.parametrize("task", TASKS)
def test_the_best_actions_reach_the_documented_return_from_every_start(task):
    total = returns(task, lambda o: optimal_action(task, o), rows=50)
    assert np.allclose(total, OPTIMAL_RETURN[task], atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_no_other_actions_do_better(task):
    rng = np.random.default_rng(0)
    total = returns(task, lambda o: optimal_action(task, o) + rng.normal(0, 0.1, (50, 1)), rows=50)
    assert (total < OPTIMAL_RETURN[task]).all()


@pytest.mark.parametrize("task", TASKS)
def test_random_actions_reach_the_documented_return(task):
    rng = np.random.default_rng(1)
    total = returns(task, lambda o: rng.uniform(-1, 1, (len(o), 1)), rows=1000)
    assert total.mean() == pytest.approx(RANDOM_RETURN[task], abs=4 * total.std() / 1000**0.5)


def test_the_delayed_reward_depends_on_the_first_two_actions_only():
    late = returns("delayed-reward", lambda o: np.where(o[:, 2:] < 0.2, o[:, :1] / 2, 1.0), rows=20)
    early = returns("delayed-reward", lambda o: np.where(o[:, 2:] < 0.2, 1.0, o[:, :1] / 2), rows=20)
    assert np.allclose(late, 1.0, atol=1e-5)
    assert early.mean() < 0.5


@pytest.mark.parametrize("task", TASKS)
def test_single_environments_pass_gymnasiums_check(task):
    check_env(ProbeEnv(task), skip_render_check=True)


def test_the_spec_counts_steps_and_agent_steps():
    env = make_env("probe:delayed-reward", num_envs=1, seed=0, action_repeat=3)
    assert (env_spec(env).max_episode_steps, env_spec(env).max_agent_steps) == (8, 3)
    env.reset()
    assert [bool(env.step(np.zeros((1, 1)))[2][0]) for _ in range(3)] == [False, False, True]


def test_images_are_refused():
    with pytest.raises(ConfigError, match="takes no option 'obs'"):
        make_env("probe:one-step", num_envs=1, seed=0, obs="pixels")
