"""Environments that users bring: a class, a function, an id of Gymnasium's registry, or a whole record."""

import sys
from contextlib import closing

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from difftori.envs.base import EnvironmentRestarted, env_spec
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.family import EnvFamily
from difftori.errors import ConfigError, NonFiniteError
from difftori.registry import make_env, resolve_env
from difftori.rl.config import parse_rl_config

SOURCE = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from difftori.envs.family import EnvFamily


class Car(gymnasium.Env):
    '''Float64 observations; actions from 0 to 4, in a matrix.'''

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(0.0, 4.0, (2, 1), np.float64)

    def __init__(self, render_mode=None, friction=0.0):
        self.render_mode, self.friction = render_mode, friction

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.time = self.np_random.uniform(-1, 1, 2), 0
        return self.state, {"success": False}

    def step(self, action):
        assert action in self.action_space
        if action[0, 0] == 4.0:
            raise RuntimeError("crashed")
        self.state = self.state * (1 - self.friction) + (np.nan if action[1, 0] == 4.0 else action[:, 0])
        self.time += 1
        return self.state, 1.0, False, self.time == 3, {"success": True}

    def render(self):
        return np.zeros((4, 4, 3), np.uint8)


class Named(Car):
    observation_space = Dict({"place": Box(-9, 9, (2,), np.float64), "image": Box(0, 255, (3, 4, 4), np.uint8)})

    def reset(self, **given):
        return self.seen(super().reset(**given)[0]), {}

    def step(self, action):
        seen, *rest = super().step(action)
        return self.seen(seen), *rest

    def seen(self, state):
        return {"place": state, "image": np.zeros((3, 4, 4), np.uint8)}


class Buttons(Car):
    action_space = Discrete(3)


class Endless(Car):
    action_space = Box(-np.inf, np.inf, (2,), np.float32)


class Counting(Car):
    observation_space = Discrete(3)


def make():
    return Car()


def make_seeded(task, seed, friction=0.5):
    if task not in ("", "ice"):
        raise ValueError(task)
    return Car(friction=friction if task == "" else 0.1 * seed)


def with_default(task="sand"):
    return Car(friction={"sand": 0.9}[task])


def needy(friction):
    return Car(friction=friction)


def vector(task, *, num_envs, seed):
    return SyncVectorEnv([Car] * num_envs, autoreset_mode=AutoresetMode.DISABLED)


def forgetful():
    return vector("", num_envs=1, seed=0)


def too_few(num_envs):
    return Car()


class Old:
    pass


number = 3
RECORD = EnvFamily(build=make_seeded, tasks=("ice", "sand"), window=(1, 2, 1))
gymnasium.register("Car-v0", Car, max_episode_steps=2, disable_env_checker=True)
"""


@pytest.fixture(autouse=True)
def _my_car(tmp_path, monkeypatch):
    """A module `my_car` in a single file on sys.path."""
    (tmp_path / "my_car.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_car", None)
    gymnasium.registry.pop("Car-v0", None)


def opened(name: str, **options) -> CheckedVectorEnv:
    return make_env(name, **{"num_envs": 2, "seed": 0, **options})


@pytest.mark.parametrize("name", ["my_car:Car", "my_car:make", "my_car:make_seeded", "gym:my_car:Car-v0"])
@pytest.mark.parametrize("workers", ["sync", "async"])
def test_an_ordinary_environment_is_scaled_checked_and_vectorized(name, workers):
    env = opened(name, workers=workers)
    spec = env_spec(env)
    assert (spec.obs_shape, spec.obs_dtype, spec.action_dim) == ((2,), "float32", 2)
    assert (env.single_action_space.low == -1).all()
    first, _ = env.reset(seed=[3, 4])
    after, rewards, _, truncated, info = env.step(np.array([[-1.0, -0.5], [0.0, -3.0]]))
    assert (after.dtype, rewards.tolist(), info["success"].tolist()) == (np.float32, [1, 1], [True, True])
    kept = 0.5 if name.endswith("seeded") else 1.0
    assert np.allclose(after, kept * first + np.array([[0.0, 1.0], [2.0, 0.0]]), atol=1e-6)
    assert info["clipped"].tolist() == [0, 1]
    assert not truncated.any()
    with pytest.raises(EnvironmentRestarted, match="row 1.*crashed"):
        env.step(np.array([[0.0, 0.0], [1.0, 0.0]]))
    env.reset(seed=[3, 4])
    with pytest.raises(NonFiniteError, match=r"NaN.*rows \[0\]"):
        env.step(np.array([[0.0, 1.0], [0.0, 0.0]]))
    env.close()


def test_actions_stay_in_their_own_units_when_demonstrations_need_it():
    env = opened("my_car:Car", unit_actions=False)
    assert env.single_action_space.high.max() == 4


def test_named_observations_are_converted_part_by_part():
    env = opened("my_car:Named")
    seen, _ = env.reset()
    assert seen in env.observation_space
    assert {name: part.dtype for name, part in seen.items()} == {"place": np.float32, "image": np.uint8}


def test_parameters_of_a_builder_are_its_options_and_task_and_seed_are_filled_in():
    assert resolve_env("my_car:make_seeded").options == {"friction": 0.5}
    assert resolve_env("my_car:Car").options == {"friction": 0.0}
    assert resolve_env("my_car:make_seeded:ice").name == "my_car:make_seeded:ice"
    for name, options, friction in (
        ("my_car:make_seeded:ice", {}, 0.3),
        ("my_car:make_seeded", {"friction": 0.25}, 0.25),
        ("my_car:with_default", {}, 0.9),
        ("my_car:needy", {"friction": 0.1}, 0.1),
        ("my_car:RECORD", {}, 0.3),
    ):
        env = opened(name, seed=3, **options)
        first, _ = env.reset()
        assert np.allclose(env.step(-np.ones((2, 2)))[0], (1 - friction) * first, atol=1e-6), name


def test_a_class_that_can_render_does_and_the_limit_of_a_registered_one_is_known():
    env = opened("my_car:Car")
    env.reset()
    assert env.render()[0].shape == (4, 4, 3)
    assert env.metadata["render_fps"] == 10
    assert env_spec(opened("gym:my_car:Car-v0")).max_episode_steps == 2


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_an_action_is_repeated_until_the_episode_ends(workers):
    env = opened("my_car:Car", action_repeat=2, workers=workers, max_episode_steps=9)
    assert (env_spec(env).action_repeat, env_spec(env).max_agent_steps, env.metadata["render_fps"]) == (2, 5, 5)
    first, _ = env.reset(seed=[3, 4])
    after, rewards, _, truncated, info = env.step(np.zeros((2, 2)))  # an action of 2 in the units of the car
    assert np.allclose(after, first + 4.0, atol=1e-6)
    assert (rewards.tolist(), truncated.tolist(), info["success"].tolist()) == ([2, 2], [False] * 2, [True] * 2)
    _, rewards, _, truncated, _ = env.step(np.zeros((2, 2)))
    assert (rewards.tolist(), truncated.tolist()) == ([1, 1], [True, True])
    env.close()
    with pytest.raises(ConfigError, match="action_repeat"):
        opened("my_car:Car", action_repeat=0)


def test_an_agents_run_repeats_actions_in_your_environment():
    config = parse_rl_config({"agent": "sac", "env": "my_car:Car", "action_repeat": 3})
    with closing(config.open_env(1)) as env:
        assert env_spec(env).action_repeat == 3


def test_a_record_carries_what_imitation_needs():
    env = resolve_env("my_car:RECORD")
    assert isinstance(env.family, EnvFamily)
    assert (env.name, env.task, env.family.window) == ("my_car:RECORD:ice", "ice", (1, 2, 1))
    assert resolve_env("my_car:RECORD:sand").task == "sand"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("my_car:Cart", {}, "perhaps you meant 'Car'"),
        ("my_cat:Car", {}, "'my_cat:Car' is unknown.*your own environment, my_module:MyEnv"),
        ("my_car", {}, "'my_car' is unknown"),
        ("my_car:number", {}, "is a int. Fix: pass a gymnasium.Env class"),
        ("my_car:Old", {}, "is a Old. Fix: pass a gymnasium.Env class"),
        ("my_car:make:ice", {}, "'my_car:make' takes no task. Fix: remove 'ice'"),
        ("my_car:RECORD:icy", {}, "'icy' is unknown in environment 'my_car:RECORD'; perhaps you meant 'ice'"),
        ("my_car:Car", {"fricton": 1}, "takes no option 'fricton'; perhaps you meant 'friction'"),
        ("my_car:needy", {}, "needs the option 'friction'"),
        (
            "my_car:forgetful",
            {},
            "returned a SyncVectorEnv, not a gymnasium.Env. Fix: add the parameter num_envs to the function",
        ),
        ("my_car:too_few", {}, "returned a Car, not a gymnasium.vector.VectorEnv. Fix: remove the parameter num_envs"),
        ("my_car:Buttons", {}, "its actions are Discrete"),
        ("my_car:Endless", {}, "have no bounds to map ±1 to"),
        ("my_car:Counting", {}, "its observations are Discrete.*. Fix: flatten them"),
        ("my_car:vector", {}, "scale them to ±1, or return a single environment"),
        ("my_car:vector", {"workers": "async"}, "takes no option 'workers'"),
        ("gym:my_cat:Car-v0", {}, "there is no module 'my_cat'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(name, options, message):
    with pytest.raises(ConfigError, match=message):
        opened(name, **options)


def test_images_with_the_channels_last_are_refused_for_agents():
    env = make_env("my_car:Car", num_envs=1, seed=0)
    env.single_observation_space = Box(0, 255, (84, 84, 3), np.uint8)
    with pytest.raises(ConfigError, match="channels last"):
        env_spec(env)
