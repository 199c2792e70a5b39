"""The recurrent mixture: what is its own; the rest is in test_every_policy.py."""

from dataclasses import replace

import pytest
import torch
from torch import distributions as D

from difftori.policies.bc_rnn import BCRNNGMM, BCRNNGMMConfig, Mixture
from difftori.types import TaskSpec, Window, state_obs
from tests.support.specs import VECTORS, demonstrations, generator, observations


def policy(spec: TaskSpec = VECTORS, **settings) -> BCRNNGMM:
    torch.manual_seed(0)
    return BCRNNGMM(BCRNNGMMConfig.model_validate({"preset": "small", "hidden": 32, **settings}), spec)


def mixture(rows: int = 3, steps: int = 4, modes: int = 5, size: int = 2) -> Mixture:
    draw = generator(7)
    return Mixture(
        torch.randn(rows, steps, modes, generator=draw),
        torch.randn(rows, steps, modes, size, generator=draw),
        torch.rand(rows, steps, modes, size, generator=draw) + 0.1,
    )


def test_the_likelihood_is_that_of_torch_distributions():
    found = mixture()
    actions = torch.randn(3, 4, 2, generator=generator(2))
    known = D.MixtureSameFamily(D.Categorical(logits=found.logits), D.Independent(D.Normal(found.means, found.stds), 1))
    assert torch.allclose(found.log_prob(actions), known.log_prob(actions), atol=1e-5)


def test_the_loss_is_the_mean_over_all_steps_of_the_window():
    learner, batch = policy(), demonstrations(VECTORS, 4)
    log_prob = learner.predict(batch.obs).log_prob(batch.actions)
    assert log_prob.shape == (4, VECTORS.horizon)
    assert learner.loss(batch, generator=generator())[0].item() == pytest.approx(-log_prob.mean().item())


def test_modes_are_drawn_by_their_weight_and_a_plan_keeps_to_one():
    logits = torch.tensor([0.2, 0.8]).log().expand(4000, 3, 2)
    means = torch.tensor([-0.5, 0.5])[:, None].expand(4000, 3, 2, 1)
    drawn = Mixture(logits, means, torch.full_like(means, 1e-4)).sample(generator()).squeeze(-1)
    assert ((drawn.abs() - 0.5).abs() < 1e-3).all()
    assert (drawn > 0).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (drawn.sign() == drawn[:, :1].sign()).all()


def test_it_learns_two_answers_to_one_observation():
    """Half of the demonstrations go left and half right; so do its actions, and none between."""
    spec = TaskSpec.rows(obs_dim=1, action_dim=1, horizon=1, low=(-1.0,), high=(1.0,))
    learner = policy(spec)
    side = torch.tensor([-0.6, 0.6]).repeat(32)
    batch = Window(state_obs(torch.zeros(64, 1)), side[:, None, None], torch.arange(64))
    optimiser = torch.optim.Adam(learner.parameters(), lr=3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        loss, _ = learner.loss(batch, generator=generator())
        loss.backward()
        optimiser.step()
    actions = learner.act(state_obs(torch.zeros(400, 1)), generator=generator()).flatten()
    assert ((actions.abs() - 0.6).abs() < 0.05).float().mean() > 0.95  # a mode of little weight may lie elsewhere
    assert (actions > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    # One Gaussian over both is at best −log(0.6·√(2πe)) = −0.91.
    assert -loss.item() > 0.5


def test_low_noise_acts_by_the_mean_of_a_mode():
    obs = observations(VECTORS, 6)
    learner = policy()
    means = learner.predict(obs).means
    away = (learner.act(obs, generator=generator()).unsqueeze(-2) - means).abs().amax(-1).amin(-1)
    assert away.max() < 1e-3
    noisy = policy(low_noise=False)
    away = (noisy.act(obs, generator=generator()).unsqueeze(-2) - means).abs().amax(-1).amin(-1)
    assert away.median() > 0.05


def test_an_action_follows_from_what_was_seen_until_then():
    spec = replace(VECTORS, n_obs_steps=3, horizon=5, n_action_steps=2)
    learner = policy(spec)
    obs = observations(spec, 2)
    later = {name: torch.cat((values[:, :2], values[:, 2:] + 0.5), 1) for name, values in obs.items()}
    earlier = {name: torch.cat((values[:, :1] + 0.5, values[:, 1:]), 1) for name, values in obs.items()}
    first, second, third = (learner.predict(seen).means for seen in (obs, later, earlier))
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2:], second[:, 2:])
    assert not torch.allclose(first[:, 2], third[:, 2]), "the past is remembered"


def test_after_the_present_the_last_observation_is_seen_again():
    short, long = policy(replace(VECTORS, horizon=5)), policy(VECTORS)
    obs = observations(VECTORS, 2)
    assert torch.allclose(short.predict(obs).means, long.predict(obs).means[:, :5], atol=1e-6)
    repeated = {name: torch.cat((values, *[values[:, -1:]] * 6), 1) for name, values in obs.items()}
    seeing = policy(replace(VECTORS, n_obs_steps=8, n_action_steps=1))
    assert torch.allclose(seeing.predict(repeated).means, long.predict(obs).means, atol=1e-6)


def test_defaults_are_those_of_the_source():
    config = BCRNNGMMConfig()
    assert (config.hidden, config.layers, config.modes, config.min_std) == (1000, 2, 5, 1e-4)
    assert (config.optimizer, config.lr, config.batch_size, config.low_noise) == ("adam", 1e-4, 16, True)
    assert BCRNNGMM.WINDOW == (10, 10, 1)
    state = BCRNNGMMConfig.model_validate({"preset": "state"})
    assert (state.hidden, state.batch_size) == (400, 100)
