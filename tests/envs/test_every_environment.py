"""What every environment must do. The package is walked: a new file is tested without being named here."""

import inspect

import numpy as np
import pytest
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode

from difftori.envs.base import RenderingError, ResetNeededError, env_spec
from difftori.envs.checked import CheckedVectorEnv
from difftori.errors import ConfigError, MissingExtraError, NonFiniteError, ShapeError
from difftori.registry import env_families, make_env, resolve_env

FAMILIES = env_families()
CASES = [(name, task) for name, family in FAMILIES.items() for task in family.tasks[:2]]


@pytest.fixture(params=CASES, ids=lambda case: ":".join(case))
def build(request):
    """Makes the environment under test: build(num_envs, seed)."""
    name, task = request.param
    opened = []

    def make(num_envs: int = 2, seed: int = 0) -> CheckedVectorEnv:
        try:
            opened.append(make_env(f"{name}:{task}", num_envs=num_envs, seed=seed))
        except (MissingExtraError, RenderingError) as error:
            pytest.skip(str(error))
        return opened[-1]

    yield make
    for env in opened:
        env.close()


def advance(env: CheckedVectorEnv, actions: np.ndarray) -> tuple:
    """What `step` returns, except that ended rows are reset."""
    observations, rewards, terminated, truncated, info = env.step(actions)
    ended = terminated | truncated
    if ended.any():
        observations, _ = env.reset(options={"reset_mask": ended})
    return observations, rewards, terminated, truncated, info


def play(env: CheckedVectorEnv, steps: int, *, seed: int | None = None) -> list[np.ndarray]:
    """Observations, rewards and flags of a seeded random walk."""
    env.action_space.seed(5)
    seen = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        observations, rewards, terminated, truncated, _ = advance(env, env.action_space.sample())
        seen += [observations, rewards, terminated, truncated]
    return seen


def test_walking_finds_the_pendulum():
    assert ("pendulum", "damped") in CASES


def test_spaces_hold_what_is_returned(build):
    env = build(3)
    observations, info = env.reset()
    assert isinstance(env.single_action_space, Box)
    assert env.single_action_space.is_bounded()
    assert isinstance(info, dict)
    for _ in range(5):
        assert observations in env.observation_space
        assert observations.shape == (3, *env.single_observation_space.shape)
        observations, rewards, terminated, truncated, info = advance(env, env.action_space.sample())
        assert rewards.shape == (3,)
        assert np.isfinite(rewards).all()
        assert terminated.dtype == truncated.dtype == bool
        assert terminated.shape == truncated.shape == (3,)
        assert isinstance(info, dict)


def test_rows_are_reset_by_the_caller(build):
    assert build().metadata["autoreset_mode"] is AutoresetMode.DISABLED


def test_actions_lie_between_minus_one_and_one(build):
    space = build().single_action_space
    assert (space.low == -1).all()
    assert (space.high == 1).all()


def test_equal_seeds_give_equal_episodes_and_others_differ(build):
    first, second, other = (play(build(seed=seed), 12) for seed in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_reset_with_a_seed_overrides_the_one_of_make(build):
    first, second = play(build(seed=1), 3, seed=9), play(build(seed=2), 3, seed=9)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_reset_continues_the_stream(build):
    env = build()
    assert not np.array_equal(env.reset()[0], env.reset()[0])


def test_rows_start_differently(build):
    observations = build(2).reset()[0]
    assert not np.array_equal(observations[0], observations[1])


def test_returned_arrays_are_not_overwritten_by_later_steps(build):
    env = build()
    env.reset()
    kept = advance(env, env.action_space.sample())
    copies = [np.array(array) for array in kept[:4]]
    advance(env, env.action_space.sample())
    assert all(np.array_equal(array, copy) for array, copy in zip(kept, copies, strict=False))


def test_ended_rows_wait_for_their_reset_and_the_others_go_on(build):
    env = build(2)
    env.reset()
    for step in range(1100):
        last, _, terminated, truncated, _ = env.step(env.action_space.sample())
        ended = terminated | truncated
        if ended.any():
            break
        if step == 0:
            last, _ = env.reset(options={"reset_mask": np.array([False, True])})
    assert ended.any(), "no episode ended within 1100 steps"
    with pytest.raises(ResetNeededError, match="reset_mask"):
        env.step(env.action_space.sample())
    observations, _ = env.reset(options={"reset_mask": ended})
    assert not np.array_equal(observations[ended], last[ended])
    assert np.array_equal(observations[~ended], last[~ended])
    env.step(env.action_space.sample())


def test_an_episode_is_replayed_from_its_seed_and_its_actions_whatever_came_before(build):
    env, twin = build(2, seed=1), build(2, seed=2)
    play(env, 5)
    rows = np.array([False, True])
    env.reset(seed=[0, 0])
    observations, info = env.reset(seed=[None, 77], options={"reset_mask": rows})
    assert info["episode_seed"][1] == 77
    first = [observations[1]]
    again = [twin.reset(seed=[77, 5])[0][0]]
    for _ in range(15):
        action = env.single_action_space.sample()
        ours, theirs = env.step(np.stack([action, action])), twin.step(np.stack([action, action]))
        first += [ours[0][1], ours[1][1]]
        again += [theirs[0][0], theirs[1][0]]
        if (ours[2] | ours[3]).any():
            break
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_agents_can_read_what_they_need(build):
    env = build(1)
    spec = env_spec(env)
    assert (spec.obs_shape, spec.obs_dtype) == (env.observation_space.shape[1:], str(env.observation_space.dtype))
    assert spec.action_dim == env.action_space.shape[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_actions_are_refused_by_row_and_step_and_change_nothing(build, value):
    env, twin = build(2), build(2)
    broken = np.zeros(env.action_space.shape)
    broken[1] = value
    env.reset()
    twin.reset()
    for step in range(min(2, env.metadata.get("max_episode_steps") or 2)):
        with pytest.raises(NonFiniteError, match=rf"step {step}.*\[1\]"):
            env.step(broken)
        action = twin.action_space.sample()
        assert np.array_equal(env.step(action)[0], twin.step(action)[0])


def test_wrongly_shaped_actions_are_refused(build):
    env = build(2)
    env.reset()
    with pytest.raises(ShapeError, match="one row per copy"):
        env.step(env.single_action_space.sample())


def test_actions_outside_the_box_act_as_clipped(build):
    env, twin = build(2), build(2)
    env.reset()
    twin.reset()
    wild = env.action_space.high + 3.0
    assert np.array_equal(env.step(wild)[0], twin.step(twin.action_space.high)[0])


def test_unknown_options_of_a_reset_are_refused_and_change_nothing(build):
    env, twin = build(2), build(2)
    if env.name.startswith("gym:"):
        pytest.skip("the options are those of the environment itself")
    with pytest.raises(ConfigError, match=r"reset options \['wind'\] are unknown.*Fix: remove them"):
        env.reset(options={"wind": 1.0})
    shown, expected = (one.reset(seed=[3, 4])[0] for one in (env, twin))
    for name in shown if isinstance(shown, dict) else [slice(None)]:
        assert np.array_equal(shown[name], expected[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_unknown_tasks_are_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=FAMILIES[name].tasks[0]):
        make_env(f"{name}:no-such-task", num_envs=1, seed=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_record_names_its_first_task_and_options_with_defaults(name):
    env = resolve_env(name)
    assert (env.name, env.task) == (f"{name}:{FAMILIES[name].tasks[0]}",) + FAMILIES[name].tasks[:1]
    assert inspect.Parameter.empty not in env.options.values()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.recorded])
def test_the_record_maps_demonstrations_to_the_observation_types_that_the_builder_has(name):
    assert "obs" in resolve_env(name).options
    for obs in resolve_env(name).recorded:
        try:
            make_env(name, num_envs=1, seed=0, obs=obs).close()
        except (MissingExtraError, RenderingError) as error:
            pytest.skip(str(error))
