"""DrQ-v2's losses against the equations written out, its schedules, and what each of its steps moves."""

from dataclasses import replace

import pytest
import torch

from difftori.agents.actor_critic import n_step
from difftori.agents.drqv2 import DrQV2
from difftori.data.replay import Replay
from difftori.types import EnvSpec
from tests.agents.test_sac import SPECS, copied, moved
from tests.support.agents import PIXELS, STATES, act, build, segment


def test_the_critics_loss_is_the_n_step_bellman_error_written_out():
    agent, batch = build("drqv2"), segment()
    batch.terminated[2, 3] = True
    for parameter in agent.target_critics.parameters():
        parameter.data += 0.1
    noise = 0.3 * torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    loss, priorities, features, q = agent.critic_loss(n_step(batch, 0.99), batch.weights, noise)
    total = 0.0
    for row in range(8):
        last = batch.obs[3, row]
        action = (torch.tanh(agent.actor(last)) + noise[row]).clamp(-1, 1)
        y = sum(0.99**t * batch.rewards[t, row] for t in range(3))
        y = y + (0.0 if row == 3 else 0.99**3 * agent.target_critics(last, action).min())
        errors = agent.critics(batch.obs[0, row], batch.actions[0, row]) - y
        torch.testing.assert_close(priorities[row], errors.abs().mean())
        total = total + errors.square().sum() / 8
    torch.testing.assert_close(loss, total)
    assert not features.requires_grad
    assert not q.requires_grad


@SPECS
def test_each_step_moves_its_own_networks_alone(spec):
    agent, batch = build("drqv2", spec), segment(spec)
    noise = torch.zeros(8, 2)
    networks = {"encoder": agent.encoder, "critics": agent.critics, "actor": agent.actor}

    def step(optimizer, loss) -> set[str]:
        before = {name: copied(network) for name, network in networks.items()}
        optimizer.step(optimizer.gradient(loss))
        assert all(p.grad is None for p in agent.parameters())
        return {name for name, network in networks.items() if moved(before[name], network)}

    loss, _, features, _ = agent.critic_loss(n_step(batch, 0.99), batch.weights, noise)
    assert step(agent.optimizer, loss) == ({"encoder", "critics"} if spec is PIXELS else {"critics"})
    assert step(agent.actor_optimizer, agent.actor_loss(features, noise)) == {"actor"}


def test_the_policy_moves_towards_higher_values_also_where_the_noise_is_clipped():
    agent = build("drqv2", lr=1e-3)
    features, noise = segment().obs[0], torch.full((8, 2), 2.0)
    before = agent.critics(features, torch.tanh(agent.actor(features))).amin(0).mean()
    loss = agent.actor_loss(features, noise)
    assert all(part.abs().max() > 0 for part in agent.actor_optimizer.gradient(loss, retain_graph=True))
    for _ in range(50):
        agent.actor_optimizer.step(agent.actor_optimizer.gradient(agent.actor_loss(features, 0 * noise)))
    assert agent.critics(features, torch.tanh(agent.actor(features))).amin(0).mean() > before + 1e-3


def test_the_target_critics_follow_at_every_update():
    agent = build("drqv2", ema=0.25, lr=1e-2)
    before = copied(agent.target_critics)
    agent.update(segment(), generator=torch.Generator().manual_seed(0))
    for was, now, online in zip(before, agent.target_critics.parameters(), agent.critics.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * was + 0.25 * online)


def test_images_are_shifted_before_they_are_encoded(monkeypatch):
    agent, seen = build("drqv2", PIXELS), []
    encode = agent.encoder.forward
    monkeypatch.setattr(agent.encoder, "forward", lambda obs: seen.append(obs) or encode(obs))
    batch = segment(PIXELS)
    agent.update(batch, generator=torch.Generator().manual_seed(0))
    later, first = seen
    for shifted, original in ((first, batch.obs[0]), (later, batch.obs[3])):
        assert shifted.shape == original.shape
        assert not torch.equal(shifted, original.float())
        for row in range(8):  # the centre is somewhere within four pixels
            centre = original[row, :, 4:-4, 4:-4].float()
            windows = shifted[row].unfold(1, 76, 1).unfold(2, 76, 1)
            assert any(torch.equal(windows[:, i, j], centre) for i in range(9) for j in range(9))


def test_the_noise_follows_the_schedule_of_agent_steps():
    agent = build("drqv2", schedule_steps=1000, updates_per_step=0.5)
    assert [agent.exploration_std(step) for step in (0, 500, 1000, 5000)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    like, g = torch.zeros(20_000, 2), torch.Generator().manual_seed(0)
    agent.updates = 500
    noise = agent._noise(like, g)
    assert noise.abs().max() == pytest.approx(0.3)
    assert (noise.abs() < 0.3).float().mean() == pytest.approx(0.997, abs=0.003)
    obs = segment().obs[0]
    mean, _ = act(agent, obs)
    explored = torch.stack([act(agent, obs, step=10_000, explore=True, seed=seed)[0] for seed in range(500)])
    inside = mean.abs() < 0.6
    torch.testing.assert_close((explored - mean).std(0)[inside], torch.full_like(mean, 0.1)[inside], rtol=0.15, atol=0)


@pytest.mark.parametrize(
    ("task", "steps", "batch"),
    [("cup-catch", 100_000, 256), ("walker-run", 500_000, 512), ("humanoid-walk", 2_000_000, 256)],
)
def test_schedule_and_batch_are_those_published_for_the_task(task, steps, batch):
    agent = build("drqv2", replace(STATES, name=f"dmc:{task}"), batch_size=None)
    assert (agent.schedule_steps, agent.batch_size) == (steps, batch)


def test_values_at_the_end_of_episodes_that_terminate_are_right():
    """Four states with rewards 1, 1, 1, −10, one after another, and returns of three steps. Ends bootstrap nothing."""
    states, rewards = torch.eye(5), [1.0, 1.0, 1.0, -10.0]
    torch.manual_seed(0)
    settings = {"horizon": 3, "width": 64, "lr": 3e-3, "batch_size": 64, "schedule_steps": 0, "ema": 0.1}
    agent = DrQV2(DrQV2.Config(preset="small", **settings), EnvSpec("my:Chain", (5,), "float32", 1, None, 1))
    replay = Replay(500, obs_shape=(5,), obs_dtype="float32", action_dim=1, length=3, alpha=0.0)
    for _ in range(20):
        replay.begin(0, states[0].numpy())
        for t, reward in enumerate(rewards):
            ends = {"terminated": t == 3, "truncated": False}
            replay.add(0, torch.rand(1).numpy(), reward, states[t + 1].numpy(), **ends)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        agent.update(replay.sample(64, generator=generator), generator=generator)
    with torch.no_grad():
        values = agent.q(states[:4], torch.zeros(4, 1)).mean(0)
    returns = [sum(0.99**k * reward for k, reward in enumerate(rewards[t:])) for t in range(4)]
    assert values.tolist() == pytest.approx(returns, abs=0.5)
