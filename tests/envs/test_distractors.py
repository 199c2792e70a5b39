"""Distractors: what they are, that a seed repeats them, and that nothing else changes."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict

from difftori.data.replay import Replay
from difftori.envs.base import env_spec
from difftori.envs.distractors import RHO, Distractors
from difftori.envs.family import EnvFamily, ResolvedEnv
from difftori.errors import ConfigError
from difftori.registry import make_env
from difftori.rl.collector import Collector

PENDULUM = "gym:Pendulum-v1"


class Observed(gymnasium.Env):
    """Returns the observation of the test's choice, and never ends."""

    metadata = {"render_modes": []}
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, space, value):
        self.observation_space, self.value = space, value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.value, {}

    def step(self, action):
        return self.value, 0.0, False, False, {}


ZERO = Box(-1.0, 1.0, (1,), np.float32), np.zeros(1, np.float32)


def episode(env, seed, steps, action=0.0):
    """The distractors (steps + 1, N) of an episode."""
    obs = [env.reset(seed=seed)[0]] + [env.step(np.array([action], np.float32))[0] for _ in range(steps)]
    return np.stack(obs)[:, 1:]


def test_they_are_autoregressive_with_variance_1_from_the_first_step_on():
    env = Distractors(Observed(*ZERO), 4000)
    values = episode(env, 3, 60)
    assert values.dtype == np.float32
    for step in (0, 1, 30, 60):  # 5 standard errors
        assert values[step].mean() == pytest.approx(0, abs=5 / 4000**0.5)
        assert values[step].var() == pytest.approx(1, abs=5 * (2 / 4000) ** 0.5)
    for lag in (1, 10):
        assert np.mean(values[20] * values[20 + lag]) == pytest.approx(RHO**lag, abs=0.08)
    assert np.corrcoef(values[20, :-1], values[20, 1:])[0, 1] == pytest.approx(0, abs=0.08)


def test_the_seed_alone_determines_them():
    first, other = (Distractors(Observed(*ZERO), 3) for _ in range(2))
    values = episode(first, 7, 20)
    assert np.array_equal(values, episode(first, 7, 20))
    assert np.array_equal(values, episode(other, 7, 20, action=1.0))
    assert not np.array_equal(values, episode(other, 8, 20))
    assert not np.array_equal(values, episode(other, None, 20))


def test_they_share_no_random_numbers_with_the_environment():
    drawn = np.random.default_rng(7).standard_normal(64).astype(np.float32)
    assert not np.isin(episode(Distractors(Observed(*ZERO), 16), 7, 3), drawn).any()


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_the_environment_below_is_unchanged(workers):
    plain = make_env(PENDULUM, num_envs=2, seed=0)
    more = make_env(PENDULUM, num_envs=2, seed=0, distractors=5, workers=workers)
    try:
        assert env_spec(more).obs_shape == (8,)
        assert env_spec(more).flattened == (("state", (3,)), ("distractors", (5,)))
        pairs = [(plain.reset(seed=[4, 5])[0], more.reset(seed=[4, 5])[0])]
        for _ in range(4):
            a, b = (env.step(np.full((2, 1), 0.3)) for env in (plain, more))
            pairs.append((a[0], b[0]))
            assert np.array_equal(a[1], b[1])
        for a, b in pairs:
            assert np.array_equal(a, b[:, :3])
            assert not np.array_equal(b[0, 3:], b[1, 3:])
    finally:
        plain.close()
        more.close()


def test_without_them_the_environment_is_the_same():
    assert env_spec(make_env(PENDULUM, num_envs=1, seed=0, distractors=0)) == env_spec(
        make_env(PENDULUM, num_envs=1, seed=0)
    )


def test_a_flattened_dict_takes_them():
    space = Dict({"a": Box(-1.0, 1.0, (2,), np.float32), "b": Box(-1.0, 1.0, (1,), np.float64)})
    value = {"a": np.ones(2, np.float32), "b": np.zeros(1)}
    env = ResolvedEnv("own", EnvFamily(lambda: Observed(space, value)), "")
    spec = env_spec(env.make(num_envs=1, seed=0, flatten_obs=True, distractors=2))
    assert spec.obs_shape == (5,)
    assert spec.flattened == (("a", (2,)), ("b", (1,)), ("distractors", (2,)))
    with pytest.raises(ConfigError, match="--flatten-obs"):
        env.make(num_envs=1, seed=0, distractors=2)


def test_other_observations_are_refused_with_the_fix():
    image = Observed(Box(0, 255, (8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match="--obs state"):
        ResolvedEnv("own", EnvFamily(lambda: image), "").make(num_envs=1, seed=0, distractors=2)
    with pytest.raises(ConfigError, match="distractors is -1"):
        Distractors(Observed(*ZERO), -1)


def test_a_running_episode_is_repeated_with_its_distractors():
    def opened(seed):
        env = make_env(PENDULUM, num_envs=2, seed=seed, distractors=4)
        replay = Replay(2000, obs_shape=(7,), obs_dtype="float32", action_dim=1, length=2, num_rows=2)
        return Collector(env, replay, 0)

    collector, other = opened(0), opened(9)
    collector.begin()
    for _ in range(17):
        collector.step(lambda obs, memory, first: (torch.full((2, 1), 0.1), {}))
    other.load(collector.state())  # raises CheckpointError if an observation differs
    assert np.array_equal(other._obs, collector._obs)
    assert np.array_equal(other.env.step(np.zeros((2, 1)))[0], collector.env.step(np.zeros((2, 1)))[0])
