"""`torch.inference_mode()` gives what `torch.no_grad()` gives."""

import pytest
import torch
from torch import nn

import difftori
from difftori.policies.normalized import NormalizedPolicy
from difftori.solver import CEM, MPPI, Adam, Box, Implicit, Newton, ProjectedGradient, solve
from tests.support.agents import act, randomised, segment
from tests.support.policies import constant_base, enlarged, refiner
from tests.support.specs import VECTORS, generator, observations

MODES = [torch.no_grad, torch.inference_mode]

with torch.inference_mode():
    WEIGHTS = torch.tensor([1.0, 2.0])
    MADE_THERE = nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))

COSTS = {
    "inference-tensor": lambda x: (WEIGHTS * (x - 0.5).square()).sum(-1),
    "module-made-in-inference-mode": lambda x: MADE_THERE(x).squeeze(-1) + x.square().sum(-1),
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    "solver", [ProjectedGradient(polish=1), Newton(), Newton(linear="cg"), Adam(), CEM(16, 4), MPPI(16, 4)]
)
def test_solves_are_the_same(solver, cost):
    found = []
    for mode in (*MODES, torch.enable_grad):
        with mode():
            solution = solve(
                COSTS[cost],
                torch.zeros(3, 2),
                solver=solver,
                box=Box(-torch.ones(2), 1.0),
                generator=torch.Generator().manual_seed(0),
            )
            found.append((solution.x, solution.status, solution.gradient_valid, solution.grad_norm))
            assert not solution.x.requires_grad
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_training_with_a_weight_made_in_inference_mode():
    target = torch.full((2,), 0.3, requires_grad=True)
    with torch.inference_mode():
        x0 = torch.zeros(3, 2)
    solution = solve(lambda x: (WEIGHTS * (x - target).square()).sum(-1), x0, adjoint=Implicit())
    (grad,) = torch.autograd.grad(solution.x.sum(), target)
    torch.testing.assert_close(grad, torch.full((2,), 3.0))


def test_plans_are_the_same():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    found = []
    for mode in MODES:
        with mode():
            state = 2 * torch.full((2, 2), 0.4)  # as an encoder's output is
            plan = difftori.plan(
                lambda s, a: s + net(torch.cat([s, a], -1)),
                lambda s, a: -s.square().sum(-1) - 0.1 * a.square().sum(-1),
                None,
                state,
                torch.zeros(2, 3, 1),
            )
            found.append(plan.actions)
    assert torch.equal(*found)


def test_a_policy_acts_the_same():
    policy = NormalizedPolicy(enlarged(refiner()).eval(), constant_base)
    found = []
    for mode in MODES:
        with mode():
            found.append(policy.act(observations(VECTORS, 3), generator=generator()))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["difftori", "tdmpc"])
def test_an_agent_acts_the_same(name):
    found = []
    for mode in MODES:
        agent = randomised(name)
        with mode():
            found.append(act(agent, segment().obs[0])[0])
    assert torch.equal(*found)
