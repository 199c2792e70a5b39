"""An environment of a user's own, odd in one way: converted, or refused with the row, the step and the fix."""

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from difftori.envs.base import env_spec
from difftori.envs.family import EnvFamily, ResolvedEnv
from difftori.errors import ConfigError, NonFiniteError, ShapeError
from difftori.rollout import CHECKED_STEPS, check_episode, named


class Reach(gymnasium.Env):
    """A point moves by the action; it ends at `limit` steps, or never. `odd` names what is unusual."""

    metadata = {"render_modes": []}
    render_mode = None

    def __init__(self, odd: str = "", limit: int | None = 6):
        self.odd, self.limit = odd, limit
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64 if odd == "float64 space" else np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1, 2), 0
        return self.seen(), self.told()

    def step(self, action):
        self.t += 1
        self.x = self.x + np.asarray(action, dtype=np.float64)
        truncated = self.limit is not None and self.t >= self.limit
        flags = (np.array([False]), np.array([truncated])) if self.odd == "flags of shape (1,)" else (False, truncated)
        reward = np.array([-1.0]) if self.odd == "flags of shape (1,)" else -1.0
        return self.seen(), reward, *flags, self.told()

    def seen(self):
        if self.odd == "another shape at step 3" and self.t == 3:
            return np.zeros(3, np.float32)
        return self.x.copy() if self.odd.startswith(("float64", "declared")) else self.x.astype(np.float32)

    def told(self):
        done = self.t == self.limit
        match self.odd:
            case "is_success":
                return {"is_success": np.array([done])}
            case "success at the end":
                return {"success": True} if done else {}
            case "no success":
                return {"distance": 1.0}
            case "info of changing length":
                return {"success": done, "contacts": np.zeros((1 + self.t % 4, 2)), "name": "x", "nested": {"a": 1}}
        return {"success": done}


class Camera(gymnasium.Env):
    """Shows the same image in a layout and type of the test's choice."""

    metadata = {"render_modes": []}
    render_mode = None
    IMAGE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)

    def __init__(self, layout: str):
        self.layout = layout
        shape = (3, 8, 6) if "first" in layout else (8, 6, 3)
        high, dtype = (1.0, np.float32) if "float" in layout else (255, np.uint8)
        self.observation_space = Dict({"image": Box(0, high, shape, dtype), "place": Box(-1.0, 1.0, (2,), np.float64)})
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)

    def seen(self):
        image = self.IMAGE.transpose(2, 0, 1) if "first" in self.layout else self.IMAGE
        image = (image / 255.0).astype(np.float32) if "float" in self.layout else image
        if "nan" in self.layout:
            image[0, 0, 0] = np.nan
        if "range" in self.layout:
            image = image * 255.0
        return {"image": image, "place": np.zeros(2)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.seen(), {}

    def step(self, action):
        return self.seen(), 0.0, False, False, {"success": False}


def opened(build, *arguments, num_envs=2, **options):
    family = EnvFamily(build=lambda: build(*arguments))
    return ResolvedEnv("own", family, "").make(num_envs=num_envs, seed=0, **options)


@pytest.mark.parametrize("odd", ["float64 space", "declared float32, float64 in fact"])
def test_float64_observations_become_float32(odd):
    env = opened(Reach, odd)
    obs, _ = env.reset(seed=[1, 2])
    assert obs.dtype == np.float32
    assert obs[0] == pytest.approx(Reach("float64 space").reset(seed=1)[0], rel=1e-6)
    assert env.step(np.zeros((2, 2)))[0].dtype == np.float32


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_another_shape_in_mid_episode_is_named_with_row_and_step(workers):
    env = ResolvedEnv("own", EnvFamily(build=Odd), "").make(num_envs=2, seed=0, workers=workers)
    env.reset(seed=[1, 2])
    env.step(np.zeros((2, 2)))
    env.step(np.zeros((2, 2)))
    with pytest.raises(
        ShapeError, match=r"own, step 3: the observation has shape \(3,\), but its space has \(2,\).*\(row 0\)"
    ):
        env.step(np.zeros((2, 2)))
    env.close()


class Odd(Reach):
    def __init__(self):
        super().__init__("another shape at step 3")


@pytest.mark.parametrize("odd", ["flags of shape (1,)", "info of changing length", "is_success"])
def test_usual_oddities_are_understood(odd):
    env = opened(Reach, odd)
    env.reset(seed=[1, 2])
    for _ in range(6):
        _, rewards, terminated, truncated, info = env.step(np.zeros((2, 2)))
    assert truncated.tolist() == info["success"].tolist() == [True, True]
    assert rewards.shape == terminated.shape == (2,)
    assert "contacts" not in info


@pytest.mark.parametrize("layout", ["uint8 last", "uint8 first", "float last", "float first"])
def test_images_of_any_layout_are_the_same_observation(layout):
    env = opened(Camera, layout, max_episode_steps=5)
    obs, _ = env.reset(seed=[1, 2])
    shown = named(obs)
    assert shown["image"].dtype == np.uint8
    assert np.array_equal(shown["image"], np.stack([Camera.IMAGE] * 2))
    assert shown["place"].dtype == np.float32


@pytest.mark.parametrize("shape", [(8, 6, 1), (1, 8, 6)])
def test_depth_images_stay_floats_with_the_channel_last(shape):
    class Depth(Reach):
        def __init__(self):
            super().__init__()
            self.observation_space = Box(0.0, 1.0, shape, np.float32)

        def seen(self):
            return np.linspace(0, 1, 48, dtype=np.float32).reshape(shape)

    env = opened(Depth)
    shown = named(env.reset(seed=[1, 2])[0])["state"]
    assert (shown.shape, shown.dtype) == ((2, 8, 6, 1), np.float32)
    assert shown[1].ravel() == pytest.approx(np.linspace(0, 1, 48))
    with pytest.raises(ConfigError, match="neither a vector nor an image"):
        env_spec(env)


def test_images_outside_their_range_are_refused():
    with pytest.raises(ShapeError, match="numbers from 0 to 143, but its space is bounded by 0 and 1"):
        opened(Camera, "float last out of range").reset(seed=[1, 2])
    with pytest.raises(NonFiniteError, match="image"):
        opened(Camera, "float last nan").reset(seed=[1, 2])


class Counts(Reach):
    """A vector of bytes, and actions that are numbers of units."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(0, 255, (2,), np.uint8)
        self.action_space = Box(0, 3, (1,), np.int64)
        self.taken = []

    def seen(self):
        return np.array([3, 200], np.uint8)

    def step(self, action):
        self.taken.append(int(action[0]))
        return super().step(np.zeros(2))


def test_vectors_of_bytes_are_numbers_and_whole_numbers_are_rounded():
    env = Counts()
    family = ResolvedEnv("own", EnvFamily(build=lambda: env), "").make(num_envs=1, seed=0)
    obs, _ = family.reset(seed=[1])
    assert obs.dtype == np.float32
    assert obs.tolist() == [[3.0, 200.0]]
    assert env_spec(family).obs_dtype == "float32"
    for action in (-1.0, -0.7, -0.3, 0.6, 0.7, 1.0):
        family.step(np.array([[action]], np.float32))
    assert env.taken == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("shape", [(), (4, 4)])
def test_observations_that_are_neither_vectors_nor_images_are_refused_for_agents(shape):
    class Other(Reach):
        def __init__(self):
            super().__init__()
            self.observation_space = Box(-1.0, 1.0, shape, np.float32)

    with pytest.raises(ConfigError, match="neither a vector.*FlattenObservation"):
        env_spec(opened(Other))


@pytest.mark.parametrize("repeat", [1, 2])
def test_a_limit_beyond_that_of_the_environment_is_told_in_its_steps(repeat, caplog):
    class Limited(Reach):
        metadata = {"render_modes": [], "max_episode_steps": 6}

    assert env_spec(opened(Limited, max_episode_steps=6, action_repeat=repeat)).max_episode_steps == 6
    assert caplog.text == ""
    assert env_spec(opened(Limited, max_episode_steps=8, action_repeat=repeat)).max_episode_steps == 6
    assert "max_episode_steps: 8 has no effect, because own ends its episodes after 6" in caplog.text


def test_episodes_can_be_given_a_limit():
    env = opened(Reach, "", None, max_episode_steps=4)
    env.reset(seed=[1, 2])
    ended = [env.step(np.zeros((2, 2)))[3].tolist() for _ in range(4)]
    assert ended == [[False] * 2] * 3 + [[True] * 2]
    assert env_spec(env).max_episode_steps == 4


def test_a_dict_becomes_one_vector_for_agents():
    class Named(Reach):
        def __init__(self):
            super().__init__()
            self.observation_space = Dict(
                {"a": Box(-1.0, 1.0, (2,), np.float32), "b": Box(-1.0, 1.0, (1,), np.float32)}
            )

        def seen(self):
            return {"a": self.x.astype(np.float32), "b": np.ones(1, np.float32)}

    env = opened(Named, flatten_obs=True)
    assert env_spec(env).obs_shape == (3,)
    with pytest.raises(ConfigError, match="--flatten-obs"):
        env_spec(opened(Named))
    with pytest.raises(ConfigError, match="image of own are images"):
        opened(Camera, "uint8 last", flatten_obs=True)


@pytest.mark.parametrize(
    ("odd", "limit", "message"),
    [
        ("", None, f"did not end within {CHECKED_STEPS} steps.*Fix: give --max-episode-steps"),
        ("no success", 6, "no `success`"),
    ],
)
def test_what_an_evaluation_needs_is_known_before_training(odd, limit, message):
    with pytest.raises(ConfigError, match=message):
        check_episode(opened(Reach, odd, limit, num_envs=1), success=True)


def test_an_environment_that_ignores_its_seed_is_warned_of(caplog):
    count = iter(range(100))

    class Counting(Reach):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=next(count), options=options)

    check_episode(opened(Counting, num_envs=1), success=True)
    assert "with the same seed begin differently" in caplog.text
    caplog.clear()
    check_episode(opened(Reach, num_envs=1), success=True)
    assert not caplog.text


def test_the_limit_of_a_wrapper_is_known(caplog):
    def limited():
        return gymnasium.wrappers.TimeLimit(Reach(), 5)

    env = opened(limited, max_episode_steps=40, num_envs=1)
    assert env.metadata["max_episode_steps"] == 5
    assert "max_episode_steps: 40 has no effect" in caplog.text


@pytest.mark.parametrize("odd", ["", "is_success", "success at the end"])
def test_what_suffices_for_an_evaluation_is_accepted(odd):
    check_episode(opened(Reach, odd, num_envs=1), success=True)
    check_episode(opened(Reach, "no success", num_envs=1), success=False)
