"""Push-T: starts, metrics, images, and replay of what people did. Needs the extra `pusht`."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from difftori.envs import pusht
from difftori.envs.base import env_spec
from difftori.errors import ConfigError, MissingExtraError
from difftori.registry import make_env, resolve_env

needs_pusht = pytest.mark.skipif(
    importlib.util.find_spec("gym_pusht") is None, reason="needs the extra: pip install 'difftori[pusht]'"
)
HUMAN = Path(__file__).parents[3] / "shared" / "data" / "pusht_cchi_v7_replay.zarr"
NEAR_GOAL = [100.0, 100.0, 256.0, 256.0, np.pi / 4]
"""The block lies on its outline."""


def made(num_envs: int = 1, **options):
    return make_env("pusht", num_envs=num_envs, seed=0, **options)


def started(env, state) -> np.ndarray:
    return env.reset(options={"reset_to_state": state})[0]


@needs_pusht
@pytest.mark.parametrize("obs", pusht.OBS_TYPES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # it warns of unbounded observations
def test_the_single_environment_passes_gymnasiums_check(obs):
    check_env(pusht.PushTEnv(obs=obs, max_steps=5), skip_render_check=True)


@needs_pusht
def test_starts_are_those_of_diffusion_policys_evaluation():
    env = made()
    state = env.reset(seed=[pusht.TEST_SEED])[0][0]
    drawn = pusht.diffusion_policy_start(pusht.TEST_SEED)
    assert drawn[:4].tolist() == [235, 124, 335, 128]
    assert np.allclose(state[:2], drawn[:2])
    assert state[4] == pytest.approx(drawn[4] % (2 * np.pi), abs=0.1)
    # Their fault is kept: the angle, set last, moves the block.
    assert 10 < np.linalg.norm(state[2:4] - drawn[2:4]) < 90


@needs_pusht
def test_a_state_that_is_asked_for_is_the_one_that_is_set():
    requested = np.array([120.0, 400.0, 300.0, 200.0, 2.5])
    assert np.allclose(started(made(), requested)[0], requested, atol=1e-4)


@needs_pusht
@pytest.mark.parametrize("options", [{"reset_to_state": [1, 2]}, {"reset_to_state": [np.nan] * 5}, {"colour": 1}])
def test_other_states_and_options_are_refused(options):
    with pytest.raises(ConfigError, match="reset_to_state"):
        made().reset(options=options)


@needs_pusht
def test_actions_are_pixels_of_the_plane():
    env = made()
    started(env, [100.0, 100.0, 400.0, 400.0, 0.0])
    for _ in range(20):
        seen = env.step(np.array([[-0.5, 0.25]]))[0]
    assert np.allclose(seen[0, :2], [128.0, 320.0], atol=1.0)


@needs_pusht
def test_success_and_score_are_told_and_success_ends_the_episode():
    env = made()
    started(env, [*NEAR_GOAL[:2], 300.0, 256.0, np.pi / 4])
    _, reward, terminated, _, info = env.step(np.zeros((1, 2)) - 0.6)
    assert 0 < info["coverage"][0] < 0.95
    assert reward[0] == info["score"][0] == pytest.approx(info["coverage"][0] / 0.95)
    assert not info["success"][0]
    assert not terminated[0]
    _, info = env.reset(options={"reset_to_state": NEAR_GOAL})
    assert (info["success"][0], info["score"][0]) == (False, 0.0)
    _, reward, terminated, truncated, info = env.step(np.zeros((1, 2)) - 0.6)
    assert (reward[0], info["score"][0], bool(info["success"][0])) == (1.0, 1.0, True)
    assert (terminated[0], truncated[0]) == (True, False)


@needs_pusht
def test_the_score_is_the_greatest_reward_so_far():
    env = made()
    # The agent stands where it pushes the block off its outline.
    started(env, [256.0, 190.0, 262.0, 262.0, np.pi / 4])
    rewards, scores = [], []
    for _ in range(25):
        _, reward, _, _, info = env.step(np.array([[0.3, 0.7]]))
        rewards.append(reward[0])
        scores.append(info["score"][0])
    assert rewards[-1] < max(rewards)
    assert scores == np.maximum.accumulate(rewards).tolist()


@needs_pusht
def test_time_is_up_after_the_steps_that_are_allowed():
    assert env_spec(made()).max_episode_steps == 300
    env = made(max_steps=3)
    env.reset()
    assert [bool(env.step(np.zeros((1, 2)))[3][0]) for _ in range(3)] == [False, False, True]


@needs_pusht
def test_images_come_stacked_for_agents_and_named_for_imitation():
    stacked, named = made(obs="pixels"), made(obs="image")
    first, seen = started(stacked, NEAR_GOAL), started(named, NEAR_GOAL)
    assert (first.shape, first.dtype) == ((1, 9, 96, 96), np.uint8)
    assert np.array_equal(first[:, :3], first[:, 6:])
    assert np.array_equal(seen["image"], first[:, 6:])
    assert np.allclose(seen["agent_pos"], [NEAR_GOAL[:2]])
    action = np.array([[0.5, 0.5]])
    second, seen = stacked.step(action)[0], named.step(action)[0]
    assert np.array_equal(second[:, :6], first[:, 3:])
    assert np.array_equal(seen["image"], second[:, 6:])
    assert not np.array_equal(second[:, 6:], first[:, 6:])
    assert stacked.render()[0].shape == (240, 240, 3)


@needs_pusht
def test_what_people_did_is_replayed_within_a_pixel():
    """Five of the 206 recordings; of all of them only number 50 departs from its replay."""
    zarr = pytest.importorskip("zarr", reason="needs zarr, from the extra `pusht`")
    if not HUMAN.exists():
        pytest.skip(f"there are no recordings at {HUMAN}")
    data = zarr.open(HUMAN, mode="r")
    ends = data["meta/episode_ends"][:]
    env = made(max_steps=1000)
    for episode in (0, 7, 33, 120, 205):
        begin, end = (0 if episode == 0 else ends[episode - 1]), ends[episode]
        states, actions = data["data/state"][begin:end], data["data/action"][begin:end]
        started(env, states[0])
        for action, following in zip(actions[:-1] / 256.0 - 1.0, states[1:], strict=True):
            seen = env.step(action[None])[0][0]
            assert np.abs(seen - following)[:4].max() < 1.0
    image = started(made(obs="image"), data["data/state"][1000])["image"][0]
    theirs = data["data/img"][1000].transpose(2, 0, 1)
    assert np.abs(image - theirs).mean() < 1.0


def test_every_fault_is_listed():
    with pytest.raises(ConfigError) as caught:
        made(obs="sound", max_steps=0)
    assert len(caught.value.faults) == 2


def test_a_missing_extra_is_named(monkeypatch):
    env = resolve_env("pusht")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"difftori\[pusht\]"):
        env.make(num_envs=1, seed=0)
