"""The term that makes DiffTORI: its gradient, its schedules, its options."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from difftori.agents import difftori
from difftori.errors import ConfigError
from difftori.registry import find_agent
from tests.support.agents import STATES, TINY, act, build, randomised, segment

lively = partial(randomised, "difftori")


@pytest.mark.parametrize(
    "options", [{"adjoint": "unrolled"}, {"adjoint": "implicit", "pg_steps": 200}, {"terminal": "action"}]
)
def test_the_gradient_through_the_solve_is_right(options):
    # From zero: the start counts as a constant, which differences of a prior's rollout would not know.
    agent = lively(init="zero", **options).double()
    agent.model.reward_head[-1].weight.data *= 0.1
    obs = torch.randn(80, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(0)
    if options.get("adjoint") == "implicit":  # it promises something at strict optima only
        obs = obs[agent._differentiable_plan(obs, g)[1].gradient_valid]
        assert len(obs) >= 3
    loss = agent.policy_gradient_loss(obs, g)
    gradient = dict(zip(_names(agent), agent.pg_descent.gradient(loss), strict=True))
    for name, parameter in agent.model.named_parameters():
        if name not in ("reward_head.0.weight", "dynamics.4.bias", "encoder.layers.0.bias"):
            continue
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=g)
        ends = []
        for sign in (1, -1):
            parameter.data.add_(direction, alpha=sign * 1e-6)
            ends.append(agent.policy_gradient_loss(obs, g).item())
            parameter.data.sub_(direction, alpha=sign * 1e-6)
        slope = (ends[0] - ends[1]) / 2e-6
        found = (gradient[name] * direction).sum().item()
        assert found == pytest.approx(slope, rel=2e-3, abs=1e-7), name


def _names(agent):
    learned = {"encoder": "encoder", "dynamics": "dynamics", "reward": "reward_head", "q": "critics"}
    return [f"{learned[n]}.{p}" for n, net in agent.pg_descent.networks.items() for p, _ in net.named_parameters()]


@pytest.mark.parametrize("pg", ["per-episode", "per-step"])
def test_an_episode_is_the_sum_of_its_states(pg, monkeypatch):
    monkeypatch.setattr(difftori, "_ROWS_AT_ONCE", 4)  # nine states in three solves
    agent = lively(pg=pg, pg_coef=3.0, init_std=0.0).double()
    agent.updates = 1
    episode = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts, losses = [], []
    for state in episode:
        loss = agent.policy_gradient_loss(state[None], torch.Generator())
        parts.append(agent.pg_descent.gradient(3.0 * loss))
        losses.append(loss.item())
    for name, *each in zip(_names(agent), *parts, strict=True):
        if name.endswith("weight"):  # the last biases move no plan
            assert sum(bool(part.abs().max() > 1e-6) for part in each) >= 3, name
    expected = parts if pg == "per-step" else [[sum(p) for p in zip(*parts, strict=True)]]
    taken = []
    monkeypatch.setattr(agent.pg_descent, "step", lambda gradient: taken.append(gradient) or 0.0)
    metrics = agent.end_episode(episode, generator=torch.Generator())
    assert len(taken) == len(expected)
    for gradient, sought in zip(taken, expected, strict=True):
        for name, a, b in zip(_names(agent), gradient, sought, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert metrics["pg_loss"] == pytest.approx(sum(losses) / 9)


def test_the_term_moves_only_what_it_may():
    agent = lively(pg_networks=("reward",))
    agent.updates = 1
    before = {n: p.clone() for n, p in agent.named_parameters()}
    agent.end_episode(torch.randn(4, 5), generator=torch.Generator().manual_seed(0))
    moved = {n.split(".")[1] for n, p in agent.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"reward_head"}


def test_a_correction_changes_the_plan_and_nothing_that_eq_3_learns():
    agent = lively(pg_networks=("correction",), init="zero")
    agent.updates = 1
    obs = segment().obs[0]
    before, model = act(agent, obs)[0], {n: p.clone() for n, p in agent.model.named_parameters()}
    for _ in range(20):
        agent.end_episode(obs, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(act(agent, obs)[0], before)
    assert all(torch.equal(p, model[n]) for n, p in agent.model.named_parameters())
    loss = agent.loss(segment(), segment().obs, torch.Generator().manual_seed(0)).total
    assert agent.correction is not None
    grads = torch.autograd.grad(loss, list(agent.correction.parameters()), allow_unused=True)
    assert grads == (None,) * 4


@pytest.mark.parametrize("pg", ["off", "replay", "per-step", "per-episode"])
def test_when_the_term_acts(pg):
    agent = lively(pg=pg)
    g = torch.Generator().manual_seed(0)
    _, metrics = agent.update(segment(), generator=g)
    assert ("pg_loss" in metrics) == (pg == "replay")
    assert bool(agent.end_episode(segment().obs[:, 0], generator=g)) == pg.startswith("per-")


def test_a_shared_optimiser_needs_replay():
    with pytest.raises(ConfigError, match="shared needs pg: replay"):
        build("difftori", pg="per-episode", pg_optimizer="shared")
    with pytest.raises(ConfigError, match="no correction"):
        build("difftori", pg="replay", pg_optimizer="shared", pg_networks=("correction",))
    agent = build("difftori", pg="replay", pg_optimizer="shared")
    _, metrics = agent.update(segment(), generator=torch.Generator().manual_seed(0))
    assert "pg_loss" in metrics


@pytest.mark.parametrize("networks", [("encoder", "dynamics", "reward", "q"), ("q",)])
def test_a_shared_optimiser_moves_the_named_networks_and_never_the_judge(networks):
    settings = {"pg": "replay", "pg_optimizer": "shared", "pg_networks": networks, "horizon_start": 3}
    gradients = []
    for coef in (0.0, 1.0):
        agent = lively(**settings, pg_coef=coef)
        loss = agent.loss(segment(), segment().obs, torch.Generator().manual_seed(0)).total
        gradients.append(agent.descent.by_network(agent.descent.gradient(loss)))
    changed = {name for name in gradients[0] if not torch.allclose(gradients[0][name], gradients[1][name], atol=1e-7)}
    assert changed == set(networks)


def test_the_term_plans_as_far_as_the_schedule_has_come():
    agent = lively(pg="replay", schedule_steps=100)
    obs = segment().obs[0]
    horizons = []
    for updates in (0, 50, 100):
        agent.updates = updates
        horizons.append(agent._differentiable_plan(obs, torch.Generator())[0].shape[1])
    assert horizons == [1, 2, 3]


@pytest.mark.parametrize(
    "options", [{"terminal": "action"}, {"init": "zero"}, {"init": "previous"}, {"q_target": "planner"}]
)
def test_options_act_and_learn(options):
    agent = lively(**options)
    obs = segment().obs[0]
    _, memory = act(agent, obs)
    actions, _ = act(agent, obs, memory, first=torch.zeros(8, dtype=torch.bool), explore=True)
    assert actions.abs().max() <= 1
    agent.update(segment(), generator=torch.Generator().manual_seed(0))


def test_the_reference_planner_knows_the_papers_tasks_alone():
    kind = find_agent("difftori")
    for name in ("dmc:ball-in-cup-catch", "dmc:cheetah-run"):
        kind(kind.Config(**TINY, planner="reference"), replace(STATES, name=name))
    with pytest.raises(ConfigError, match="no settings for 'humanoid-run'"):
        kind(kind.Config(**TINY, planner="reference"), replace(STATES, name="dmc:humanoid-run"))


def test_compiled_rows_come_in_multiples_and_count_once():
    agent, obs, noise = lively(init="zero"), segment().obs[0], torch.Generator()
    assert agent._padded_rows(obs) is obs
    agent.compiles = True
    rows = agent._padded_rows(obs)
    assert len(rows) == 64
    agent.compiles = False
    expected = agent.policy_gradient_loss(obs, noise)
    torch.testing.assert_close(agent.policy_gradient_loss(rows, noise, len(obs)), expected)


def test_the_reference_planner_is_the_release():
    spec = type(STATES)("dmc:cheetah-run", (5,), "float32", 2, 1000, 2)
    kind = find_agent("difftori")
    agent = kind(kind.Config(**TINY, planner="reference"), spec)
    agent.updates = 1
    actions, _ = act(agent, torch.randn(2, 5))
    assert actions.abs().max() <= 1
    assert "pg_loss" in agent.end_episode(torch.randn(3, 5), generator=torch.Generator().manual_seed(0))


def test_planning_beats_the_prior_in_the_model():
    agent = lively()
    obs = segment().obs[0]
    latent = agent.model.encode(obs)
    start = agent.model.rollout(latent, torch.zeros(len(latent), 3, agent.spec.action_dim))
    from difftori.solver import Detached

    actions, solution = agent.plan(latent, 3, start, Detached(), 20)
    objective = agent.objective(latent, 3)
    assert (solution.cost <= objective.cost(start.flatten(1)) + 1e-6).all()
    assert (solution.cost < objective.cost(start.flatten(1)) - 1e-3).any()


def test_diagnoses_and_judgements_are_finite():
    agent = lively()
    g = torch.Generator().manual_seed(0)
    found = agent.diagnose(segment(), generator=g)
    assert {"ratio/encoder", "cosine/q", "free", "valid", "gain"} <= found.keys()
    assert all(abs(v) < 1e9 for v in found.values())
    judged = agent.judge(torch.randn(40, 5), torch.rand(40, 2), torch.rand(40))
    assert -1 <= judged["obs_q_correlation"] <= 1


def test_the_critics_targets_are_lambda_returns():
    batch = segment()
    batch.terminated[1, 2] = True
    batch.mask[2, 3] = 0
    value = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    r, going_on = batch.rewards, (~batch.terminated).float()

    one_step = build("difftori")._lambda_returns(batch, value)
    torch.testing.assert_close(one_step, r + 0.99 * going_on * value)

    to_the_end = build("difftori", obs_q_lambda=1.0)._lambda_returns(batch, value)
    whole = r[0] + 0.99 * r[1] + 0.99**2 * r[2] + 0.99**3 * value[2]
    whole[2] = r[0, 2] + 0.99 * r[1, 2]
    whole[3] = r[0, 3] + 0.99 * r[1, 3] + 0.99**2 * value[1, 3]
    torch.testing.assert_close(to_the_end[0], whole)

    half = build("difftori", obs_q_lambda=0.5)._lambda_returns(batch, value)
    torch.testing.assert_close(half[1, 0], r[1, 0] + 0.99 * (0.5 * value[1, 0] + 0.5 * half[2, 0]))
