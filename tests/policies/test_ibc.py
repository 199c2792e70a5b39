"""Implicit behavioural cloning: what is its own; the rest is in test_every_policy.py and test_energy.py."""

from dataclasses import replace

import pytest
import torch

from difftori.interfaces import Policy
from difftori.policies.bc import BC, BCConfig
from difftori.policies.ibc import IBC, IBCConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.types import Moments, TaskSpec, Window, state_obs
from tests.support.specs import VECTORS, demonstrations, generator, observations

ONE = TaskSpec.rows(obs_dim=1, action_dim=1, horizon=1, low=(-1.0,), high=(1.0,))


def policy(spec: TaskSpec = VECTORS, **settings) -> IBC:
    torch.manual_seed(0)
    small = {"preset": "small", "hidden": (64, 64), "num_negatives": 32, "samples": 128}
    return IBC(IBCConfig.model_validate({**small, **settings}), spec)


def taught(learner: Policy, updates: int, lr: float) -> Policy:
    """Of two answers: at every state s, −0.6 or 0.6."""
    optimiser = torch.optim.Adam(learner.parameters(), lr=lr)
    draw = generator(1)
    for _ in range(updates):
        states = 2 * torch.rand(64, 1, generator=draw) - 1
        sides = torch.tensor([-0.6, 0.6]).repeat(32)[:, None, None]
        optimiser.zero_grad()
        learner.loss(Window(state_obs(states), sides, torch.arange(64)), generator=draw)[0].backward()
        optimiser.step()
    return learner


def test_it_takes_one_of_two_answers_where_regression_takes_their_mean():
    states = state_obs(torch.linspace(-1, 1, 21)[:, None])
    regressed = taught(BC(BCConfig(hidden=(32,)), ONE), 40, 3e-3).act(states, generator=generator()).flatten()
    assert regressed.abs().max() < 0.2
    chosen = taught(policy(ONE), 80, 5e-3).act(states, generator=generator()).flatten()
    assert ((chosen.abs() - 0.6).abs() < 0.1).all()


def test_langevin_negatives_and_inference_find_an_answer():
    learner = policy(
        ONE,
        negatives="langevin",
        num_negatives=8,
        inference="langevin",
        langevin_steps=15,
        gradient_penalty=1.0,
        dropout=0.0,
    )
    chosen = taught(learner, 60, 5e-3).act(state_obs(torch.linspace(-1, 1, 21)[:, None]), generator=generator())
    assert ((chosen.abs() - 0.6).abs() < 0.2).all()


@pytest.mark.parametrize("inference", ["derivative-free", "langevin"])
def test_nothing_is_dropped_when_it_acts(inference):
    obs = observations(VECTORS, 3)
    acted = [policy(dropout=rate, inference=inference).act(obs, generator=generator()) for rate in (0.0, 0.9)]
    assert torch.equal(*acted)
    batch = demonstrations(VECTORS, 3)
    losses = [policy(dropout=rate).loss(batch, generator=generator())[0] for rate in (0.0, 0.9)]
    assert not torch.equal(*losses)


@pytest.mark.parametrize("inference", ["derivative-free", "langevin"])
def test_every_candidate_is_inside_the_box_and_the_range_of_the_data(inference):
    moments = Moments((-4.0, -0.5), (4.0, 0.5), (0.0, 0.0), (0.1, 0.1))
    spec = replace(VECTORS, moments=moments, low=(-1.0, -1.0), high=(2.0, 1.0))
    learner = NormalizedPolicy(policy(spec, inference=inference, negatives="uniform", positive_noise=0.0))
    seen = []
    learner.policy.score.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].detach()))
    learner.act(observations(spec, 3), generator=generator())
    learner.loss(demonstrations(spec, 3), generator=generator())
    assert len(seen) > 3
    for candidates in seen[:-1]:
        actions = learner.normalizer.denormalize_actions(candidates.unflatten(-1, (4, 2)))
        assert (actions >= torch.tensor([-1.0, -0.5]) - 1e-6).all()
        assert (actions <= torch.tensor([2.0, 0.5]) + 1e-6).all()


def test_one_action_is_sought_and_the_others_repeat_it():
    spec = replace(VECTORS, horizon=2, n_action_steps=1)
    assert IBC.WINDOW == (2, 2, 1)
    actions = NormalizedPolicy(policy(spec)).act(observations(spec, 3), generator=generator())
    assert torch.equal(actions[:, 0], actions[:, 1])
    assert policy(spec).score.first.in_features == 10 + 2


def test_parts_are_only_a_matter_of_memory():
    obs = observations(VECTORS, 5)
    whole, parts = (policy(at_once=count).act(obs, generator=generator()) for count in (2**18, 16))
    assert torch.allclose(whole, parts, atol=1e-5)


def test_training_contrasts_the_expert_with_as_many_as_asked():
    loss, metrics = policy(num_negatives=7).loss(demonstrations(VECTORS, 4), generator=generator())
    assert loss.item() == pytest.approx(torch.tensor(8.0).log().item(), abs=0.2)
    assert 0 <= metrics["expert_first"] <= 1


def test_defaults_are_those_of_the_source():
    config = IBCConfig()
    assert (config.hidden, config.dropout, config.num_negatives) == ((1024,) * 4, 0.1, 1024)
    assert (config.samples, config.search_steps, config.search_std, config.positive_noise) == (1024, 5, 0.03, 1e-4)
    assert (config.optimizer, config.lr, config.beta1, config.beta2, config.warmup) == ("adamw", 1e-4, 0.95, 0.999, 500)
