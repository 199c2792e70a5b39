"""Planner, objectives, and the door for control people."""

import pytest
import torch

import difftori
from difftori import EnergyObjective, Planner, ReturnObjective, plan
from difftori.errors import BoxError, NonFiniteError, ShapeError
from difftori.solver import ILQR, MPPI, Adam, Box, Detached, GradientDescent, ProjectedGradient
from difftori.steering import Steering
from tests.support.devices import never_waits
from tests.support.problems import F64, lqr


def double_integrator(gain):
    def dynamics(state, action):
        position, velocity = state[..., :1], state[..., 1:]
        return torch.cat([position + 0.1 * velocity, velocity + 0.1 * gain * action], -1)

    def reward(state, action):
        return -state.square().sum(-1) - 0.01 * action.square().sum(-1)

    return dynamics, reward


def test_the_objective_is_the_discounted_return():
    """Eq. 4, term by term, by hand."""
    dynamics, reward = double_integrator(1.0)
    state, actions = torch.randn(2, 2, dtype=F64), torch.randn(2, 3, 1, dtype=F64)
    objective = ReturnObjective(dynamics, reward, lambda s: 5 * s[..., 0], state, 3, 1, discount=0.9)
    total, s = 0.0, state
    for t in range(3):
        total = total + 0.9**t * reward(s, actions[:, t])
        s = dynamics(s, actions[:, t])
    total = total + 0.9**3 * 5 * s[:, 0]
    torch.testing.assert_close(objective.cost(actions.flatten(1)), -total)


def test_stacked_steps_have_the_same_cost_and_gradient():
    """The rewards of all steps and all candidates in one evaluation, with functions that take the step too."""
    reference = torch.randn(9, 2, dtype=F64)

    def dynamics(state, action):
        return torch.cat([state[..., :1] + 0.1 * state[..., 1:], state[..., 1:] + 0.1 * action], -1)

    def reward(state, action, t):
        return -(state - reference[t]).square().sum(-1) - 0.01 * action.square().sum(-1)

    state, plans = torch.randn(2, 2, dtype=F64), torch.randn(4, 2, 3, dtype=F64)
    for value in (None, lambda s: 5 * s[..., 0]):
        plain, stacked = (
            ReturnObjective(dynamics, reward, value, state, 3, 1, discount=0.9, first_step=2, stacked=flag)
            for flag in (False, True)
        )
        costs = torch.stack([plain.cost(x) for x in plans])
        torch.testing.assert_close(torch.stack([stacked.cost(x) for x in plans]), costs)
        torch.testing.assert_close(stacked.costs(plans), costs)
        x = plans[0].clone().requires_grad_()
        (grad,), (theirs,) = (torch.autograd.grad(each.cost(x).sum(), x) for each in (stacked, plain))
        torch.testing.assert_close(grad, theirs)


@pytest.mark.parametrize("solver", [ProjectedGradient(), MPPI(samples=8, elites=4), GradientDescent(0.1), Adam()])
def test_a_fixed_number_of_steps_never_waits_for_the_device(solver):
    dynamics, reward = double_integrator(1.0)
    planner = Planner(solver, Detached(), Box(-1.0, 1.0), 3, tolerance=0.0)
    state, start = torch.empty(2, 2, device="meta"), torch.empty(2, 3, 1, device="meta")
    objective = ReturnObjective(dynamics, reward, None, state, 3, 1, 0.9)
    with torch.no_grad(), never_waits():
        planner.plan(objective, start)


def test_reading_a_value_is_seen():
    with pytest.raises(AssertionError, match="a value is read"), never_waits():
        bool(torch.empty(1, device="meta").sum() > 0)
    with pytest.raises(AssertionError, match="a copy between devices"), never_waits():
        torch.ones(2).to("meta")


def test_the_energy_is_the_discounted_score():
    """Eq. 7, term by term."""
    dynamics, score = double_integrator(1.0)
    state, actions = torch.randn(2, 2, dtype=F64), torch.randn(2, 2, 1, dtype=F64)
    objective = EnergyObjective(dynamics, score, state, 2, 1, discount=0.5)
    expected = score(state, actions[:, 0]) + 0.5 * score(dynamics(state, actions[:, 0]), actions[:, 1])
    torch.testing.assert_close(objective.cost(actions.flatten(1)), -expected)
    with pytest.raises(ShapeError, match="horizon=2 needs dynamics"):
        EnergyObjective(None, score, state, 2, 1)


@pytest.mark.parametrize("solver", [None, ILQR()])
def test_plan_solves_lqr_with_its_gradient(solver):
    objective, leaves = lqr()
    result = plan(
        objective.next,
        lambda s, a: -objective.stage_cost(s, a),
        lambda s: -objective.terminal_cost(s),
        objective.state,
        torch.zeros(3, objective.horizon, 2, dtype=F64),
        low=-50.0,
        high=50.0,
        solver=solver,
        max_steps=60,
    )
    exact = objective.riccati().reshape(result.actions.shape)
    torch.testing.assert_close(result.actions, exact, rtol=0, atol=1e-7)
    for a, b in zip(
        torch.autograd.grad(result.actions.sum(), leaves), torch.autograd.grad(exact.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.value, -objective.cost(exact.flatten(1)).detach())


def test_a_gain_is_learned_through_the_plan():
    """The gradient is of use: actions planned with the true gain teach a planner with a wrong one."""
    state = torch.randn(8, 2, dtype=F64)
    zeros = torch.zeros(8, 3, 1, dtype=F64)
    truth = plan(*double_integrator(2.0), None, state, zeros, -20.0, 20.0).actions.detach()
    gain = torch.tensor(0.7, dtype=F64, requires_grad=True)
    adam = torch.optim.Adam([gain], lr=0.3)
    for _ in range(25):
        adam.zero_grad()
        (
            plan(*double_integrator(gain), None, state, zeros, -20.0, 20.0, max_steps=8).actions - truth
        ).square().mean().backward()
        adam.step()
    assert abs(float(gain.detach()) - 2.0) < 0.2


def test_bounds_per_action_and_per_step():
    dynamics, reward = double_integrator(1.0)
    state, zeros = torch.ones(3, 2, dtype=F64), torch.zeros(3, 4, 1, dtype=F64)
    high = torch.tensor([[0.1], [0.2], [0.3], [0.4]], dtype=F64)
    actions = plan(dynamics, reward, None, state, zeros, low=-high, high=high).actions
    assert bool((actions.abs() <= high).all())
    tight = plan(dynamics, reward, None, state, zeros, low=torch.tensor([-0.05]), high=torch.tensor([0.05])).actions
    assert float(tight.abs().max()) <= 0.05 + 1e-9


def test_bounds_per_row():
    dynamics, reward = double_integrator(1.0)
    state, zeros = torch.ones(3, 2, dtype=F64), torch.zeros(3, 4, 1, dtype=F64)
    high = torch.tensor([0.1, 0.2, 0.3], dtype=F64)[:, None, None].expand(3, 4, 1)
    actions = plan(dynamics, reward, None, state, zeros, low=-high, high=high).actions
    torch.testing.assert_close(actions.abs().amax((1, 2)), high[:, 0, 0])


def test_bounds_and_candidates_of_another_shape():
    dynamics, reward = double_integrator(1.0)
    state, zeros = torch.ones(3, 2), torch.zeros(3, 4, 1)
    for shape in ((5,), (3, 1), (2, 4, 1)):
        with pytest.raises(BoxError, match=r"low has shape .* \(B H A\) = \(3, 4, 1\)"):
            plan(dynamics, reward, None, state, zeros, low=-torch.ones(shape), high=torch.ones(shape))
    objective = ReturnObjective(dynamics, reward, None, state, 4, 1)
    for shape in ((2, 4), (5, 3, 4), (5, 2, 4, 1)):
        with pytest.raises(ShapeError, match=r"candidates have shape .*\(3, 4, 1\)"):
            Planner(MPPI(), Detached()).plan(objective, zeros, candidates=torch.zeros(shape))


def test_wrong_shapes_are_named():
    dynamics, reward = double_integrator(1.0)
    state = torch.zeros(3, 2)
    with pytest.raises((ShapeError, TypeError), match="(init_actions)|(B H A)"):
        plan(dynamics, reward, None, state, torch.zeros(3, 4))
    objective = ReturnObjective(dynamics, reward, None, state, 4, 1)
    with pytest.raises(ShapeError, match=r"\(3, 5, 1\).*\(3, 4, 1\)"):
        Planner().plan(objective, torch.zeros(3, 5, 1))


def test_the_planner_of_td_mpc():
    """MPPI, detached, with policy trajectories among the candidates."""
    dynamics, reward = double_integrator(1.0)
    state = torch.ones(2, 2)
    objective = ReturnObjective(dynamics, reward, None, state, 4, 1)
    planner = Planner(MPPI(samples=64, elites=8), Detached(), Box(-1.0, 1.0), max_steps=6)
    generator = torch.Generator().manual_seed(0)
    candidates = -torch.ones(3, 2, 4, 1)
    result = planner.plan(objective, torch.zeros(2, 4, 1), generator=generator, candidates=candidates)
    best = Planner(ProjectedGradient(), Detached(), max_steps=50).plan(objective, torch.zeros(2, 4, 1))
    assert bool((result.value <= best.value + 1e-5).all())
    assert bool((result.value >= best.value - 0.1 * best.value.abs()).all())


@pytest.mark.parametrize("how", ["clamped in the cost", "steered"])
def test_every_plan_has_the_states_that_its_actions_lead_to(how):
    start, zeros = torch.tensor([[3.0], [-3.0]], dtype=F64), torch.zeros(2, 2, 1, dtype=F64)
    objective = ReturnObjective(lambda s, a: s + a, lambda s, a: -(s + a).square().sum(-1), None, start, 2, 1)
    if how == "steered":
        found = Steering(lambda actions: actions.square().sum((1, 2)), 0.1).plan(Planner(), objective, zeros)
    else:
        found = Planner(GradientDescent(0.3), Detached(), clamp_in_cost=True, max_steps=9).plan(objective, zeros)
        assert found.actions.abs().max() > 1
    actions = found.actions.clamp(-1, 1)
    expected = torch.cat([start[:, None], start[:, None] + actions.cumsum(1)], 1)
    torch.testing.assert_close(found.states, expected, rtol=0, atol=1e-12)


def test_shifting_a_plan():
    dynamics, reward = double_integrator(1.0)
    result = plan(dynamics, reward, None, torch.ones(1, 2), torch.zeros(1, 3, 1))
    shifted = result.shifted()
    assert torch.equal(shifted[:, :2], result.actions.detach()[:, 1:])
    assert torch.equal(shifted[:, 2], result.actions.detach()[:, 2])


def test_throw_names_the_row():
    dynamics, reward = double_integrator(1.0)
    state = torch.ones(2, 2)
    state[1] = float("nan")
    objective = ReturnObjective(dynamics, reward, None, state, 3, 1)
    with pytest.raises(NonFiniteError, match=r"rows \[1\]"):
        Planner().plan(objective, torch.zeros(2, 3, 1), throw=True)
    assert bool(torch.isfinite(Planner().plan(objective, torch.zeros(2, 3, 1)).actions).all())


def test_public_names():
    assert {"plan", "Plan", "Planner", "ReturnObjective", "EnergyObjective"} <= set(difftori.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = difftori.nothing


def test_a_module_takes_the_step_as_a_function_does():
    class Reward(torch.nn.Module):
        def forward(self, state, action, t):
            return -(action[..., 0] - t).square()

    found = plan(lambda s, a: s, Reward(), None, torch.zeros(2, 1), torch.zeros(2, 3, 1), low=-9.0, high=9.0)
    torch.testing.assert_close(found.actions[..., 0], torch.arange(3.0).expand(2, 3), atol=1e-3, rtol=0)
