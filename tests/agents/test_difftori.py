"""The term that makes DiffTORI: its gradient, its schedules, its options."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from difftori.agents import difftori
from difftori.errors import ConfigError
from difftori.registry import find_agent
from difftori.solver import Detached
from tests.support.agents import PIXELS, STATES, TINY, act, build, randomised, segment

lively = partial(randomised, "difftori")
SIZES = {name: value for name, value in TINY.items() if name not in ("samples", "elites")}


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
        obs = obs[agent._differentiable_plan(obs, g).solution.gradient_valid]
        assert len(obs) >= 3
    loss = agent.policy_gradient_loss(obs, g)
    gradient = dict(zip(_names(agent), agent.pg_optimizer.gradient(loss), strict=True))
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
    return [f"{learned[n]}.{p}" for n, net in agent.pg_optimizer.networks.items() for p, _ in net.named_parameters()]


def test_an_episode_is_the_sum_of_its_states(monkeypatch):
    monkeypatch.setattr(difftori, "_MAX_ROWS", 4)  # nine states in three solves
    agent = lively(pg_coef=3.0, init_std=0.0).double()
    agent.updates = 1
    episode = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts, losses = [], []
    for state in episode:
        loss = agent.policy_gradient_loss(state[None], torch.Generator())
        parts.append(agent.pg_optimizer.gradient(3.0 * loss))
        losses.append(loss.item())
    for name, *each in zip(_names(agent), *parts, strict=True):
        if name.endswith("weight"):  # the last biases move no plan
            assert sum(bool(part.abs().max() > 1e-6) for part in each) >= 3, name
    expected = [sum(p) for p in zip(*parts, strict=True)]
    taken = []
    monkeypatch.setattr(agent.pg_optimizer, "step", lambda gradient: taken.append(gradient) or 0.0)
    metrics = agent.end_episode(episode, generator=torch.Generator())
    (gradient,) = taken
    for name, a, b in zip(_names(agent), gradient, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert metrics["pg_loss"] == pytest.approx(sum(losses) / 9)


def test_the_term_moves_only_what_it_may():
    agent = lively(pg_networks=("reward",))
    agent.updates = 1
    before = {n: p.clone() for n, p in agent.named_parameters()}
    agent.end_episode(torch.randn(4, 5), generator=torch.Generator().manual_seed(0))
    moved = {n.split(".")[1] for n, p in agent.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"reward_head"}


@pytest.mark.parametrize("pg", ["off", "replay", "per-episode"])
def test_when_the_term_acts(pg):
    agent = lively(pg=pg)
    g = torch.Generator().manual_seed(0)
    _, metrics = agent.update(segment(), generator=g)
    assert ("pg_loss" in metrics) == (pg == "replay")
    assert bool(agent.end_episode(segment().obs[:, 0], generator=g)) == (pg == "per-episode")


def test_a_shared_optimiser_needs_replay():
    with pytest.raises(ConfigError, match="shared needs pg: replay"):
        build("difftori", pg="per-episode", pg_optimizer="shared")
    agent = build("difftori", pg="replay", pg_optimizer="shared")
    _, metrics = agent.update(segment(), generator=torch.Generator().manual_seed(0))
    assert "pg_loss" in metrics


@pytest.mark.parametrize("networks", [("encoder", "dynamics", "reward", "q"), ("q",)])
def test_a_shared_optimiser_trains_the_named_networks_and_never_the_critics_of_observations(networks, monkeypatch):
    settings = {"pg": "replay", "pg_optimizer": "shared", "pg_networks": networks, "horizon_start": 3}
    gradients = []
    for coef in (0.0, 1.0):
        agent = lively(**settings, pg_coef=coef)
        taken = []
        monkeypatch.setattr(agent.optimizer, "step", lambda gradient, taken=taken: taken.append(gradient) or 0.0)
        agent.update(segment(), generator=torch.Generator().manual_seed(0))
        gradients.append(agent.optimizer.by_network(taken[0]))
    changed = {name for name in gradients[0] if not torch.allclose(gradients[0][name], gradients[1][name], atol=1e-7)}
    assert changed == set(networks)


def test_the_term_plans_as_far_as_the_schedule_has_come():
    agent = lively(pg="replay", schedule_steps=100)
    obs = segment().obs[0]
    horizons = []
    for updates in (0, 50, 100):
        agent.updates = updates
        horizons.append(agent._differentiable_plan(obs, torch.Generator()).actions.shape[1])
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


@pytest.mark.parametrize("terminal", ["prior", "action"])
def test_the_next_solve_starts_from_the_plan_shifted_by_one_step_with_the_last_action_repeated(terminal, monkeypatch):
    agent, solves = lively(init="previous", terminal=terminal), []
    plan = type(agent).plan

    def watched(self, latent, horizon, start, adjoint, steps):
        solves.append((start, plan(self, latent, horizon, start, adjoint, steps)))
        return solves[-1][1]

    monkeypatch.setattr(type(agent), "plan", watched)
    obs = segment().obs[0]
    _, memory = act(agent, obs)
    later = torch.ones(8, dtype=torch.bool)
    later[:5] = False
    act(agent, obs, memory, first=later)
    (first, found), (start, _) = solves
    torch.testing.assert_close(start[:5, :-1], found.actions[:5, 1:])
    torch.testing.assert_close(start[:5, -1], found.actions[:5, -1])
    assert found.actions[:5, -1].abs().min() > 0
    assert not torch.equal(start[5:, 0], found.actions[5:, 1]), "their episodes begin"


def test_the_reference_planner_knows_the_papers_tasks_alone():
    kind = find_agent("difftori")
    for name in ("dmc:ball-in-cup-catch", "dmc:cheetah-run"):
        kind(kind.Config(**SIZES, planner="reference"), replace(STATES, name=name))
    with pytest.raises(ConfigError, match="no settings for 'humanoid-run'"):
        kind(kind.Config(**SIZES, planner="reference"), replace(STATES, name="dmc:humanoid-run"))


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
    agent = kind(kind.Config(**SIZES, planner="reference"), spec)
    agent.updates = 1
    actions, _ = act(agent, torch.randn(2, 5))
    assert actions.abs().max() <= 1
    assert "pg_loss" in agent.end_episode(torch.randn(3, 5), generator=torch.Generator().manual_seed(0))


def test_planning_beats_the_prior_in_the_model():
    agent = lively()
    obs = segment().obs[0]
    latent = agent.model.encode(obs)
    start = agent.model.rollout(latent, torch.zeros(len(latent), 3, agent.spec.action_dim))
    solution = agent.plan(latent, 3, start, Detached(), 20).solution
    objective = agent.objective(latent, 3)
    assert (solution.cost <= objective.cost(start.flatten(1)) + 1e-6).all()
    assert (solution.cost < objective.cost(start.flatten(1)) - 1e-3).any()


def test_diagnostics_are_finite():
    agent = lively()
    g = torch.Generator().manual_seed(0)
    found = agent.diagnose(segment(), generator=g)
    assert {"ratio/encoder", "cosine/q", "free", "valid", "gain"} <= found.keys()
    assert all(abs(v) < 1e9 for v in found.values())
    calibration = agent.value_calibration(torch.randn(40, 5), torch.rand(40, 2), torch.rand(40))
    assert -1 <= calibration["obs_q_correlation"] <= 1


@pytest.mark.parametrize(
    ("spec", "chosen", "steps"), [(STATES, None, 3), (STATES, 2, 2), (PIXELS, None, 1), (PIXELS, 3, 3)]
)
def test_its_critic_is_trained_on_one_step_of_images(spec, chosen, steps, monkeypatch):
    agent, seen = build("difftori", spec, obs_q_steps=chosen), []

    def spied(*arguments):
        seen.append(len(arguments[4]))
        return critic_loss(*arguments)

    critic_loss = difftori.critic_loss
    monkeypatch.setattr(difftori, "critic_loss", spied)
    agent.update(segment(spec), generator=torch.Generator().manual_seed(0))
    assert seen == [steps]


def test_without_the_term_its_critic_can_be_left_out():
    agent = lively(pg="off", obs_q_coef=0.0)
    before = [p.clone() for p in agent.obs_critics.parameters()]
    g = torch.Generator().manual_seed(0)
    _, metrics = agent.update(segment(), generator=g)
    assert metrics["grad_norm"] > 0
    assert "obs_q_loss" not in metrics
    assert all(torch.equal(a, b) for a, b in zip(before, agent.obs_critics.parameters(), strict=True))
    assert agent.diagnose(segment(), generator=g) == {}
    with pytest.raises(ConfigError, match="--pg off, or --obs-q-coef"):
        lively(pg="replay", obs_q_coef=0.0)


def test_no_network_for_the_term_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="name at least one network, or set pg: off"):
        difftori.DiffTORIConfig(pg_networks=())
