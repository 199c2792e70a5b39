"""SAC's losses against the equations written out, and what each of its steps moves."""

import math

import pytest
import torch

from difftori.agents.actor_critic import n_step
from difftori.models.actor_critic import squashed_gaussian
from difftori.models.nets import noise_like
from tests.support.agents import PIXELS, STATES, act, build, segment

SPECS = pytest.mark.parametrize("spec", [STATES, PIXELS], ids=["state", "pixels"])


def moved(before: list, network) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def copied(network) -> list:
    return [p.clone() for p in network.parameters()]


def test_the_critics_loss_is_the_soft_bellman_error_written_out():
    agent, batch = build("sac", horizon=2), segment(steps=2)
    batch.terminated[1, 3] = True
    batch.weights[:] = torch.rand(8, generator=torch.Generator().manual_seed(5))
    for parameter in agent.target_critics.parameters():
        parameter.data += 0.1
    noise = noise_like(batch.actions[0], torch.Generator().manual_seed(1))
    loss, priorities, q = agent.critic_loss(n_step(batch, 0.99), batch.weights, noise)
    total = 0.0
    for row in range(8):
        mean, raw = agent.actor(batch.obs[2, row, None]).chunk(2, -1)
        log_std = -5 + 3.5 * (torch.tanh(raw) + 1)
        action, log_prob = squashed_gaussian(mean, log_std, noise[row, None])
        next_q = agent.target_critics(batch.obs[2, row, None], action).min()
        value = 0.0 if row == 3 else next_q - 0.1 * log_prob[0]
        y = batch.rewards[0, row] + 0.99 * batch.rewards[1, row] + 0.99**2 * value
        errors = agent.critics(batch.obs[0, row], batch.actions[0, row]) - y
        torch.testing.assert_close(priorities[row], errors.abs().mean())
        total = total + batch.weights[row] * errors.square().sum() / 8
    torch.testing.assert_close(loss, total)
    assert not q.requires_grad


@SPECS
def test_each_step_moves_its_own_networks_alone(spec):
    agent, batch = build("sac", spec, horizon=1), segment(spec, steps=1)
    noise = torch.zeros(8, 2)
    networks = {"encoder": agent.encoder, "critics": agent.critics, "actor": agent.actor, "t": agent.temperature}

    def step(optimizer, loss) -> set[str]:
        before = {name: copied(network) for name, network in networks.items()}
        optimizer.step(optimizer.gradient(loss))
        assert all(p.grad is None for p in agent.parameters())
        return {name for name, network in networks.items() if moved(before[name], network)}

    loss, _, _ = agent.critic_loss(n_step(batch, 0.99), batch.weights, noise)
    assert step(agent.optimizer, loss) == ({"encoder", "critics"} if spec is PIXELS else {"critics"})
    loss, log_prob = agent.actor_loss(batch.obs[0], noise)
    assert step(agent.actor_optimizer, loss) == {"actor"}
    assert step(agent.temperature_optimizer, agent.temperature_loss(log_prob)) == {"t"}


def test_the_policy_moves_towards_higher_values():
    agent, obs = build("sac", lr=1e-3, init_temperature=1e-4), segment().obs[0]
    noise = torch.zeros(8, 2)
    before, _ = agent.actor_loss(obs, noise)
    for _ in range(50):
        loss, _ = agent.actor_loss(obs, noise)
        agent.actor_optimizer.step(agent.actor_optimizer.gradient(loss))
    assert agent.actor_loss(obs, noise)[0] < before - 1e-3


@pytest.mark.parametrize(("entropy", "rises"), [(-3.0, True), (-1.0, False)])
def test_the_temperature_moves_the_entropy_to_its_target(entropy, rises):
    """The target of two action dimensions is −2: below it, the temperature rises."""
    agent = build("sac")
    before = agent.temperature().item()
    assert math.isclose(before, 0.1, rel_tol=1e-6)
    loss = agent.temperature_loss(torch.full((8,), -entropy))
    agent.temperature_optimizer.step(agent.temperature_optimizer.gradient(loss))
    assert (agent.temperature().item() > before) == rises


@SPECS
def test_the_target_follows_at_the_rates_of_its_parts(spec):
    agent, batch = build("sac", spec, ema=0.5, encoder_ema=0.25, lr=1e-2, horizon=1), segment(spec, steps=1)
    g = torch.Generator().manual_seed(0)
    before = copied(agent.target_critics.heads)
    agent.update(batch, generator=g)
    assert not moved(before, agent.target_critics.heads)  # every second update
    trunk, encoder = copied(agent.target_critics.trunk), copied(agent.target_encoder)
    agent.update(batch, generator=g)
    parts = [(0.5, before, agent.target_critics.heads, agent.critics.heads)]
    parts += [(0.25, trunk, agent.target_critics.trunk, agent.critics.trunk)]
    parts += [(0.25, encoder, agent.target_encoder, agent.encoder)]
    for rate, old, target, online in parts:
        for was, now, there in zip(old, target.parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(now, (1 - rate) * was + rate * there)
    assert len(trunk) == (4 if spec is PIXELS else 0)


def test_from_pixels_policy_and_temperature_learn_at_every_second_update():
    agent, batch = build("sac", PIXELS, horizon=1), segment(PIXELS, steps=1)
    g = torch.Generator().manual_seed(0)
    assert "actor_loss" not in agent.update(batch, generator=g)[1]
    assert "actor_loss" in agent.update(batch, generator=g)[1]


def test_it_explores_by_sampling_and_acts_at_its_mean():
    agent, obs = build("sac"), segment().obs[0]
    mean, _ = agent.actor(obs).chunk(2, -1)
    torch.testing.assert_close(act(agent, obs)[0], torch.tanh(mean))
    explored = torch.stack([act(agent, obs, explore=True, seed=seed)[0] for seed in range(2000)]).double()
    mean, log_std = agent._gaussian(obs)
    u = torch.atanh(explored.clamp(-1 + 1e-7, 1 - 1e-7))
    torch.testing.assert_close(u.mean(0), mean.double(), rtol=0, atol=0.05)
    torch.testing.assert_close(u.std(0), log_std.exp().double(), rtol=0.1, atol=0)


def test_defaults_are_those_of_the_observation_type():
    state, pixels = build("sac", batch_size=None), build("sac", PIXELS, batch_size=None)
    assert (state.batch_size, pixels.batch_size) == (1024, 128)
    assert [a.optimizer.inner.defaults["lr"] for a in (state, pixels)] == [1e-4, 1e-3]
    assert [a.temperature_optimizer.inner.defaults["betas"][0] for a in (state, pixels)] == [0.9, 0.5]
