"""TD-MPC's loss against the sum written out, and its schedules."""

import pytest
import torch

from difftori.agents.latent_model import trained_by_model_loss
from difftori.agents.losses import model_loss, prior_loss
from difftori.optim import GuardedOptimizer
from tests.support.agents import act, build, randomised, segment


def test_the_loss_is_equation_3_written_out():
    agent = build("tdmpc")
    g = torch.Generator().manual_seed(3)
    for parameter in agent.parameters():
        parameter.data.normal_(std=0.2, generator=g)
    batch = segment()
    batch.terminated[1, 2] = True
    batch.mask[2, 3] = 0
    batch.weights[:] = torch.rand(8, generator=g)
    model, target, s = agent.model, agent.target, agent.settings
    noise = (s.std_end * torch.randn(batch.actions.shape, generator=g)).clamp(-0.3, 0.3)
    loss = model_loss(model, target, batch, batch.obs, noise, s.coefficients())
    all_next = model.prior(model.encode(batch.obs[1:]), noise)
    total = 0.0
    for row in range(8):
        z = model.encode(batch.obs[0, row])
        for t in range(3):
            a = batch.actions[t, row]
            following = batch.obs[t + 1, row]
            q_next = target.q(model.encode(following), all_next[t, row]).min()
            going_on = 0.0 if batch.terminated[t, row] else 1.0
            goal = batch.rewards[t, row] + s.discount * going_on * q_next
            term = s.value_coef * ((model.q(z, a) - goal.detach()) ** 2).sum()
            term = term + s.reward_coef * (model.reward(z, a) - batch.rewards[t, row]) ** 2
            z = model.next(z, a)
            term = term + s.consistency_coef * ((z - target.encode(following)) ** 2).mean()
            total = total + batch.weights[row] * s.rho**t * batch.mask[t, row] * term / (8 * 3)
    torch.testing.assert_close(loss.total, total)


def test_schedules_run_from_start_to_end():
    settings = build("tdmpc", horizon=5).settings
    assert [settings.plan_horizon(step) for step in (0, 12_500, 25_000, 99_999)] == [1, 3, 5, 5]
    assert settings.exploration_std(0) == 0.5
    assert abs(settings.exploration_std(25_000) - 0.05) < 1e-12


def test_the_target_follows_slowly():
    agent = build("tdmpc", ema=0.5, ema_every=2)
    before = agent.target.encoder.layers[0].weight.clone()
    agent.update(segment(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(agent.target.encoder.layers[0].weight, before)
    agent.update(segment(), generator=torch.Generator().manual_seed(0))
    expected = 0.5 * before + 0.5 * agent.model.encoder.layers[0].weight
    torch.testing.assert_close(agent.target.encoder.layers[0].weight, expected)


def test_the_prior_learns_without_moving_the_model():
    agent = build("tdmpc")
    agent.model.critics.members[0][-1].weight.data.normal_()
    latents = torch.randn(4, 8, 8)
    loss = prior_loss(agent.model, latents, torch.ones(3, 8), torch.zeros(4, 8, 2), 0.5)
    critics = [p.clone() for p in agent.model.critics.parameters()]
    policy = [p.clone() for p in agent.model.policy.parameters()]
    agent.prior_optimizer.step(agent.prior_optimizer.gradient(loss))
    assert all(torch.equal(a, b) for a, b in zip(critics, agent.model.critics.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(policy, agent.model.policy.parameters(), strict=True))


def test_the_prior_does_not_learn_at_latents_after_the_end_of_an_episode():
    agent = build("tdmpc")
    agent.model.critics.members[0][-1].weight.data.normal_()
    latents, mask = torch.randn(4, 8, 8), torch.ones(3, 8)
    mask[1:, 2] = 0  # row 2 has the latents of steps 0 and 1
    other = latents.clone()
    other[2:, 2] = torch.randn(2, 8)
    losses = [prior_loss(agent.model, each, mask, torch.zeros(4, 8, 2), 0.5) for each in (latents, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_large_rewards_train_reward_and_value(scale):
    """Each row's term is bounded, and its gradient is not zero then."""
    agent = randomised("tdmpc")
    batch = segment()
    batch.rewards[:] = scale
    noise = torch.zeros(3, 8, 2)
    loss = model_loss(agent.model, agent.target, batch, batch.obs, noise, agent.settings.coefficients())
    optimizer = GuardedOptimizer(trained_by_model_loss(agent.model), 1.0)
    gradient = optimizer.by_network(optimizer.gradient(loss.total))
    assert all(bool(gradient[name].any()) for name in ("reward", "q"))
    assert loss.total < 1e5


def test_planning_finds_what_the_model_promises():
    agent = build("tdmpc", horizon=1, samples=256, elites=16)
    agent.model.reward_head[-1].weight.data.normal_()
    obs = segment().obs[0]
    latent = agent.model.encode(obs)
    best, _ = act(agent, obs)
    random = 2 * torch.rand(200, 8, 2) - 1
    worth = agent.model.reward(latent.expand(200, 8, 8), random)
    assert (agent.model.reward(latent, best) >= worth.quantile(0.9, dim=0)).all()


@pytest.mark.parametrize("name", ["tdmpc", "difftori"])
def test_reward_and_value_shape_the_latent_only_if_they_may(name):
    def trained(consistency_coef, **settings):
        """The gradient of Eq. 3 by network, with the reward, the value or both weighted."""
        agent = randomised(name, consistency_coef=consistency_coef, **settings)
        noise = torch.zeros(3, 8, 2)
        loss = model_loss(agent.model, agent.target, segment(), segment().obs, noise, agent.settings.coefficients())
        optimizer = GuardedOptimizer(trained_by_model_loss(agent.model), 1.0)
        return optimizer.by_network(optimizer.gradient(loss.total)), loss.total

    for weights in ({"reward_coef": 0.0}, {"value_coef": 0.0}):
        shaped, _ = trained(0.0, **weights)
        apart, _ = trained(0.0, **weights, reward_shapes_latent=False)
        assert all(bool(shaped[network].any()) for network in ("encoder", "dynamics"))
        assert not any(bool(apart[network].any()) for network in ("encoder", "dynamics"))
        assert all(torch.equal(shaped[network], apart[network]) for network in ("reward", "q"))
    apart, value = trained(2.0, reward_shapes_latent=False)
    consistency, _ = trained(2.0, reward_coef=0.0, value_coef=0.0)
    assert all(torch.equal(apart[network], consistency[network]) for network in ("encoder", "dynamics"))
    assert torch.equal(value, trained(2.0)[1])


def test_the_policy_gradient_term_still_trains_a_latent_that_the_reward_does_not_shape():
    agent = randomised("difftori", pg="replay", reward_shapes_latent=False)
    loss = agent.policy_gradient_loss(segment().obs[0], torch.Generator().manual_seed(0))
    gradient = agent.pg_optimizer.by_network(agent.pg_optimizer.gradient(loss))
    assert all(bool(gradient[network].any()) for network in ("encoder", "dynamics"))


def test_a_gradient_of_any_memory_layout_is_stepped_as_it_is():
    """Transposed, shared by two parameters, or expanded: a fused step reads memory in order, and clipping writes to it."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    optimizer = GuardedOptimizer({"network": network}, 0.5, 1.0)
    first, second = optimizer.parameters
    wanted = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])
    for loss in ((first.t() * wanted).sum() + second.sum(), ((first + second) * wanted.t()).sum()):
        gradient = optimizer.gradient(loss)
        copies = [part.clone() for part in gradient]
        before = [parameter.detach().clone() for parameter in optimizer.parameters]
        norm = optimizer.step(gradient)
        assert norm.item() == pytest.approx(12.0**0.5)
        moved = [parameter.detach() - old for parameter, old in zip(optimizer.parameters, before, strict=True)]
        assert all(torch.equal(change.sign(), -part.sign()) for change, part in zip(moved, copies, strict=True))
        optimizer.inner.state.clear()
