"""The recurrent baseline: what is its own."""

import torch

from difftori.policies.lstm import LSTMConfig, LSTMPolicy
from difftori.policies.normalized import NormalizedPolicy
from difftori.types import TaskSpec, state_obs


def policy(horizon: int) -> LSTMPolicy:
    torch.manual_seed(0)
    return LSTMPolicy(
        LSTMConfig(hidden=16), TaskSpec.rows(obs_dim=3, action_dim=1, horizon=horizon, low=(-2.0,), high=(2.0,))
    )


def test_controls_are_emitted_one_after_another():
    """A longer horizon continues the same sequence."""
    obs = state_obs(torch.randn(4, 3))
    assert torch.allclose(policy(4).predict(obs), policy(9).predict(obs)[:, :4], atol=1e-6)


def test_each_control_depends_on_the_one_before_it():
    one, other = policy(3), policy(3)
    torch.nn.init.ones_(other.embed_control[0].weight)
    obs = state_obs(torch.randn(4, 3))
    assert torch.equal(one.predict(obs)[:, 0], other.predict(obs)[:, 0])
    assert not torch.allclose(one.predict(obs)[:, 1], other.predict(obs)[:, 1])


def test_clamping_belongs_to_acting_only():
    learner = policy(5)
    torch.nn.init.constant_(learner.decode[-1].bias, 7.0)
    obs = state_obs(torch.randn(2, 3))
    assert (learner.predict(obs) > 5).all()
    assert (NormalizedPolicy(learner).act(obs, generator=torch.Generator()) == 2).all()


def test_defaults_are_those_of_the_source():
    config = LSTMConfig()
    assert (config.hidden, config.lr, config.optimizer, config.batch_size) == (256, 1e-4, "adam", 32)
