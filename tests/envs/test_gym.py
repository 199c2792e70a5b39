"""Environments of Gymnasium's registry: what is taken, and why the rest is refused."""

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from gymnasium.utils.env_checker import check_env

from difftori.envs.base import RenderingError, env_spec
from difftori.envs.gym import GymEnv
from difftori.errors import ConfigError, MissingExtraError
from difftori.registry import make_env

UNIT = Box(-1.0, 1.0, (2,), np.float32)


def make(task: str, **options):
    return make_env(f"gym:{task}", **options)


class Stub(gymnasium.Env):
    """Has the spaces it is given; its observation is the number of steps, its reward the action's sum."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space
        self.time = 0

    def _seen(self):
        return np.full(self.observation_space.shape, self.time, self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._seen(), {"options": str(options)}

    def step(self, action):
        assert action in self.action_space
        self.time += 1
        return self._seen(), float(action.sum()), False, False, {}


@pytest.fixture
def registered():
    """Registers a Stub with the given spaces: registered(observations, actions) -> id."""
    names = []

    def register(observations, actions, **spec) -> str:
        names.append(f"DifftoriStub{len(names)}-v0")
        gymnasium.register(names[-1], lambda: Stub(observations, actions), **spec)
        return names[-1]

    yield register
    for name in names:
        del gymnasium.registry[name]


def test_actions_are_rescaled_and_rewards_of_repeats_summed(registered):
    actions = Box(np.array([[0.0], [-4.0]]), np.array([[1.0], [2.0]]), dtype=np.float64)
    env = make(registered(Box(0, 9, (2, 2), np.float64), actions), num_envs=2, seed=0, action_repeat=3)
    assert env.action_space.shape == (2, 2)
    observations, _ = env.reset()
    assert (observations.shape, observations.dtype) == ((2, 4), np.float32)
    observations, rewards, *_ = env.step(np.array([[-1.0, -1.0], [1.0, 0.0]]))
    assert rewards.tolist() == [3 * -4.0, 3 * (1.0 - 1.0)]
    assert (observations == 3).all()


def test_time_limits_truncate_and_stand_in_the_spec(registered):
    env = make(registered(UNIT, UNIT, max_episode_steps=5), num_envs=1, seed=0, action_repeat=2)
    assert (env_spec(env).max_episode_steps, env_spec(env).max_agent_steps, env_spec(env).action_repeat) == (5, 3, 2)
    env.reset()
    flags = [env.step(np.zeros((1, 2)))[2:4] for _ in range(3)]
    assert [(bool(a[0]), bool(b[0])) for a, b in flags] == [(False, False), (False, False), (False, True)]


def test_a_limit_is_a_multiple_of_the_action_repeat(registered):
    name = registered(UNIT, UNIT)
    with pytest.raises(
        ConfigError, match="max_episode_steps: 7 is no multiple of the action repeat 3 of gym:.*Fix: 6 or 9"
    ):
        make(name, num_envs=1, seed=0, action_repeat=3, max_episode_steps=7)
    env = make(name, num_envs=1, seed=0, action_repeat=3, max_episode_steps=6)
    assert env_spec(env).max_agent_steps == 2


def test_images_are_stacked_channels_first(registered):
    env = make(registered(Box(0, 255, (8, 6, 3), np.uint8), UNIT), num_envs=1, seed=0, obs="pixels")
    assert env.reset()[0].shape == (1, 9, 8, 6)
    assert np.unique(env.step(np.zeros((1, 2)))[0][0, ::3, 0, 0]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("observations", "actions", "obs", "message"),
    [
        (UNIT, gymnasium.spaces.Discrete(3), "state", "use a Box"),
        (UNIT, Box(-np.inf, np.inf, (2,), np.float32), "state", "no bounds"),
        (Dict({"a": UNIT}), UNIT, "state", "flatten them"),
        (UNIT, UNIT, "pixels", "obs='pixels' does not support"),
        (Box(0, 255, (8, 8, 3), np.uint8), UNIT, "state", "obs='state' does not support"),
    ],
)
def test_spaces_that_cannot_be_learnt_from_are_refused(registered, observations, actions, obs, message):
    with pytest.raises(ConfigError, match=message):
        make(registered(observations, actions), num_envs=1, seed=0, obs=obs)


def test_unknown_ids_are_refused_with_gymnasiums_suggestion():
    with pytest.raises(ConfigError, match="Pendulun.*Pendulum"):
        make("Pendulun-v1", num_envs=1, seed=0)


def test_a_module_that_registers_is_imported():
    with pytest.raises(ConfigError, match="no_such_module"):
        make("no_such_module:Foo-v0", num_envs=1, seed=0)


def test_other_renderings_are_refused():
    with pytest.raises(ConfigError, match="takes no option 'render'"):
        make("Pendulum-v1", num_envs=1, seed=0, render="fast")


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized")  # the library scales the actions outside
def test_pendulum_passes_gymnasiums_check_and_steps_as_it_does():
    check_env(GymEnv("Pendulum-v1"), skip_render_check=True)
    env, reference = make("Pendulum-v1", num_envs=1, seed=0), gymnasium.make("Pendulum-v1")
    observations, _ = env.reset(seed=[5])
    assert np.array_equal(observations[0], reference.reset(seed=5)[0])
    ours, theirs = env.step(np.array([[0.25]])), reference.step(np.array([0.5], dtype=np.float32))
    assert np.array_equal(ours[0][0], theirs[0])
    assert ours[1][0] == pytest.approx(theirs[1])
    reference.close()


def test_an_environment_without_images_says_so(registered):
    env = make(registered(UNIT, UNIT), num_envs=1, seed=0)
    env.reset()
    with pytest.raises(RenderingError, match="no render mode"):
        env.render()
    env.step(np.zeros((1, 2)))


def test_a_missing_package_is_named(registered):
    identifier = registered(UNIT, UNIT)
    gymnasium.registry[identifier].entry_point = "no_such_package.inside:Env"
    with pytest.raises(MissingExtraError, match="needs the package 'no_such_package'"):
        make(identifier, num_envs=1, seed=0)
