"""`refine`: your own policy as the base, in Python."""

import numpy as np
import pytest
import torch

import difftori
from difftori.data.trajectories import Trajectories
from difftori.errors import ConfigError, ShapeError
from difftori.il.refine import refine
from difftori.loading import open_model
from difftori.policies.difftori import DiffTORIConfig

LENGTH = 12
TINY = DiffTORIConfig(updates=2, hidden=(8,), latent_dim=4)


def closing(episodes: int = 20) -> Trajectories:
    """Episodes in which the gripper closes in the last three steps."""
    step = np.tile(np.arange(LENGTH), episodes)
    state = np.stack([step / LENGTH, np.random.default_rng(0).normal(size=len(step)) * 0.05], 1)
    actions = np.where(step >= LENGTH - 3, 1.0, -1.0)[:, None]
    return Trajectories.of({"state": state}, actions, np.arange(LENGTH, LENGTH * episodes + 1, LENGTH))


def opened(horizon):
    return lambda obs: torch.full((len(obs["state"]), horizon, 1), -1.0)


def refined(base, low=(-1.0,), high=(1.0,), settings=TINY, **window):
    window = {"n_obs_steps": 1, "horizon": 8, "n_action_steps": 1} | window
    return refine(base, closing(), low=low, high=high, settings=settings, **window)


def test_the_last_steps_of_an_episode_are_learned():
    policy = refined(opened(8), settings=DiffTORIConfig(updates=300, hidden=(32,), latent_dim=8))
    states = torch.stack((torch.arange(LENGTH) / LENGTH, torch.zeros(LENGTH)), 1)[:, None]
    actions = policy.act({"state": states}, generator=torch.Generator())[:, 0, 0]
    assert (actions > 0).tolist() == [False] * 9 + [True] * 3


def test_a_refined_policy_acts_in_closed_loop_without_a_run():
    policy = refined(opened(8), n_obs_steps=2, n_action_steps=3)
    loop = difftori.load(policy)
    states = [torch.tensor([step / LENGTH, 0.0]) for step in range(4)]
    plan = policy.act({"state": torch.stack((states[0], states[0]))[None]}, generator=torch.Generator())
    acted = [loop.act({"state": state}) for state in states]
    assert np.allclose(acted[:3], plan[0, 1:4])
    again = policy.act({"state": torch.stack((states[2], states[3]))[None]}, generator=torch.Generator())
    assert np.allclose(acted[3], again[0, 1])


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ((1.0,), (-1.0,), "is above high"),
        ((-1.0, -1.0), (1.0,), "low: .* is no bound of 1 action"),
        ((-1.0,), (float("nan"),), "high: .* is no bound of 1 action"),
    ],
)
def test_bounds_are_checked(low, high, words):
    with pytest.raises(ConfigError, match=words):
        refined(opened(8), low, high)


@pytest.mark.parametrize("window", [{"n_action_steps": 9}, {"n_action_steps": 0}, {"horizon": 0}])
def test_the_window_is_checked(window):
    with pytest.raises(ConfigError, match="windows: "):
        refined(opened(8), **window)


def test_a_base_may_return_an_array():
    def base(obs):
        return np.full((len(obs["state"]), 8, 1), -1.0)

    obs = {"state": torch.zeros(2, 1, 2)}
    given, same = (refined(one).act(obs, generator=torch.Generator()) for one in (base, opened(8)))
    assert torch.equal(given, same)


@pytest.mark.parametrize("base", [opened(7), lambda obs: None])
def test_other_results_of_a_base_are_refused(base):
    with pytest.raises(ShapeError, match="Fix: return"):
        refined(base)


def test_a_loaded_run_is_refused_with_what_fits(policy_run):
    with pytest.raises(ConfigError, match="open_model"):
        refined(difftori.load(policy_run))
    assert callable(open_model(policy_run).component.act)
