"""Fixed variables: low equals high. They stay, the others are solved, and nothing else notices them."""

import pytest
import torch

import difftori
from difftori.solver import Box, Detached, Implicit, LeastSquaresObjective, Unrolled, solve
from tests.support.problems import F64, swing
from tests.support.solvers import SOLVERS, STACKED


class Chain(LeastSquaresObjective):
    """Neighbours pull at one another."""

    def __init__(self, target):
        self.target = target

    def residual(self, x):
        return torch.cat([x - self.target, x[:, 1:] - 0.5 * x[:, :-1]], -1)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_fixed_variable_stays_and_the_others_are_solved(name):
    if name in ("ilqr", "ddp"):
        case = swing()
        objective, n = case.objective, 6
    else:
        objective, n = Chain(torch.tensor([2.0, -0.4, 0.3], dtype=F64)), 3
    low, high = torch.full((n,), -1.0, dtype=F64), torch.ones(n, dtype=F64)
    low[1] = high[1] = 0.2
    rows = 4
    box = Box(low, high)
    if name in STACKED or name in ("ilqr", "ddp") or not name.startswith("lm"):
        solver = SOLVERS[name]
    else:
        pytest.skip("its offset belongs to another cost")
    solution = solve(
        objective, box.project(torch.zeros(rows, n, dtype=F64)), solver=solver, box=box, adjoint=Detached(),
        max_steps=200, generator=torch.Generator().manual_seed(0), history=True,
    )  # fmt: skip
    assert solution.history is not None
    assert bool((solution.history.x[..., 1] == 0.2).all())
    others = [i for i in range(n) if i != 1]

    def reduced(y):
        x = torch.full((y.shape[0], n), 0.2, dtype=F64)
        return objective.cost(x.index_copy(1, torch.tensor(others), y))

    best = solve(reduced, torch.zeros(rows, n - 1, dtype=F64), box=Box(-1.0, 1.0), adjoint=Detached(), max_steps=300)
    assert bool((solution.cost <= best.cost + 2e-2 * (1 + best.cost.abs())).all())


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit(linear="cg"), Unrolled()])
def test_a_fixed_variable_has_no_derivative(adjoint):
    target = torch.tensor([0.2, 0.3, 0.4], dtype=F64, requires_grad=True)
    box = Box(torch.tensor([0.2, -1.0, -1.0], dtype=F64), torch.tensor([0.2, 1.0, 1.0], dtype=F64))
    x0 = box.project(torch.zeros(1, 3, dtype=F64)).requires_grad_()
    solution = solve(Chain(target), x0, box=box, adjoint=adjoint, max_steps=200)
    assert bool(solution.gradient_valid.all())
    (grad, *_) = torch.autograd.grad(solution.x[0, 0], [target, x0], retain_graph=True, materialize_grads=True)
    assert grad.tolist() == [0.0, 0.0, 0.0]
    (grad,) = torch.autograd.grad(solution.x[0, 1:].sum(), target)
    hessian = torch.autograd.functional.hessian(lambda x: Chain(target.detach()).cost(x[None])[0], x0[0].detach())
    expected = torch.linalg.solve(hessian[1:, 1:], torch.ones(2, dtype=F64))
    torch.testing.assert_close(grad, torch.cat([torch.zeros(1, dtype=F64), expected]))


def test_rows_may_have_different_fixed_variables_and_all_may_be_fixed():
    low = torch.tensor([[0.5, -1.0], [-1.0, -1.0], [0.1, 0.2]])
    high = torch.tensor([[0.5, 1.0], [1.0, 1.0], [0.1, 0.2]])
    box = Box(low, high)
    solution = solve(lambda x: (x - 0.3).square().sum(-1), box.project(torch.zeros(3, 2)), box=box)
    torch.testing.assert_close(solution.x, torch.tensor([[0.5, 0.3], [0.3, 0.3], [0.1, 0.2]]))
    assert bool(solution.converged.all())
    assert bool(solution.gradient_valid.all())
    assert solution.steps[2] == 0


def test_a_plan_with_a_fixed_first_action():
    low, high = torch.full((4, 1), -1.0), torch.ones(4, 1)
    low[0] = high[0] = 0.7
    plan = difftori.plan(
        lambda s, a: s + a,
        lambda s, a: -s.square().sum(-1) - 0.1 * a.square().sum(-1),
        None,
        torch.ones(2, 1),
        torch.zeros(2, 4, 1),
        low,
        high,
    )
    assert plan.actions[:, 0, 0].tolist() == pytest.approx([0.7, 0.7])
    assert bool(plan.solution.converged.all())
    assert float(plan.actions[:, 1].max()) < -0.5


def test_bounds_with_a_gradient_are_warned_of():
    limit = torch.tensor(1.0, requires_grad=True)
    with pytest.warns(UserWarning, match=r"Box: high requires a gradient.*high\.detach\(\).*constraint"):
        Box(-1.0, limit)
    Box(-1.0, limit.detach())
    with torch.no_grad():
        Box(-1.0, limit)
