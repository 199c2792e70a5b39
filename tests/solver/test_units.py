"""The units of the variables do not matter: newtons beside radians are solved as if they had been scaled by hand.

Units here are powers of two, so the results are equal bit for bit.
"""

import pytest
import torch

import difftori
from difftori.solver import (
    ILQR,
    AugmentedLagrangian,
    Box,
    Detached,
    GaussNewton,
    Implicit,
    LeastSquaresObjective,
    Newton,
    ProjectedGradient,
    Unrolled,
    solve,
)
from tests.support.solvers import SOLVERS

UNIT = (2.0**13, 2.0**-4, 1.0)
SCALE_FREE = {
    "projected-gradient": ProjectedGradient(),
    "projected-gradient-polished": ProjectedGradient(polish=2),
    "newton": Newton(),
    "newton-cg": Newton(linear="cg"),
    "gauss-newton": GaussNewton(),
}


class Bent(LeastSquaresObjective):
    """A sum of squares of y = x / unit, with parameters."""

    def __init__(self, unit: torch.Tensor, target: torch.Tensor):
        self.unit, self.target = unit, target

    def residual(self, x):
        y = x / self.unit
        return torch.cat([torch.tanh(y) - self.target, 0.3 * (y[:, :1] - y[:, 1:2]), 0.2 * y], -1)


def solved(name, dtype, unit, constrained=False, adjoint=None, **settings):
    unit = torch.tensor(unit, dtype=dtype)
    target = torch.tensor([[0.5, -0.2, 0.9], [-0.9, 0.3, 0.1]], dtype=dtype, requires_grad=True)
    inequality = (lambda x: (x / unit).sum(-1, keepdim=True) - 0.2) if constrained else None
    return target, solve(
        Bent(unit, target),
        0.1 * unit.expand(2, 3),
        solver=SCALE_FREE[name],
        adjoint=adjoint,
        box=Box(-unit, unit),
        inequality=inequality,
        augmented=AugmentedLagrangian() if constrained else None,
        **settings,
    )


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_a_solve_in_any_units(name, dtype, constrained):
    if name == "gauss-newton" and constrained:
        pytest.skip("constraints are no squares")
    by_hand, one = solved(name, dtype, (1.0, 1.0, 1.0), constrained)
    target, other = solved(name, dtype, UNIT, constrained)
    unit = torch.tensor(UNIT, dtype=dtype)
    assert torch.equal(other.x / unit, one.x)
    for field in ("cost", "steps", "status", "grad_norm", "gradient_valid", "violation"):
        assert torch.equal(getattr(other, field), getattr(one, field)), field
    assert other.converged.all()
    (got,) = torch.autograd.grad((other.x / unit).sum(), target)
    (wanted,) = torch.autograd.grad(one.x.sum(), by_hand)
    assert torch.equal(got, wanted)


def test_the_history_and_unrolled_steps_are_in_the_tasks_units():
    by_hand, one = solved("newton", torch.float64, (1.0, 1.0, 1.0), adjoint=Unrolled(), history=True, max_steps=3)
    target, other = solved("newton", torch.float64, UNIT, adjoint=Unrolled(), history=True, max_steps=3)
    unit = torch.tensor(UNIT, dtype=torch.float64)
    assert torch.equal(other.history.x / unit, one.history.x)
    assert torch.equal(other.history.cost, one.history.cost)
    (got,) = torch.autograd.grad((other.x / unit).sum(), target)
    (wanted,) = torch.autograd.grad(one.x.sum(), by_hand)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["newton", "projected-gradient"])
def test_what_is_computed_at_the_first_access_uses_the_same_units(name):
    _, one = solved(name, torch.float64, (1.0, 1.0, 1.0), adjoint=Detached())
    _, other = solved(name, torch.float64, UNIT, adjoint=Detached())
    assert torch.equal(other.gradient_valid, one.gradient_valid)
    # The problem itself stays that of the caller.
    assert torch.equal(other.problem.objective.cost(other.x), one.cost)


def test_bounds_are_not_rounded():
    """Ranges that are no powers of two: x is exactly on its bound."""
    high = torch.tensor([20_000.0, 0.3, 7.7])
    solution = solve(lambda x: -(x / high).sum(-1), torch.zeros(2, 3), box=Box(-high, high))
    assert torch.equal(solution.x, high.expand(2, 3))


def test_fixed_and_open_variables():
    low, high = torch.tensor([3.0, -1e4, -torch.inf, -0.1]), torch.tensor([3.0, 1e4, torch.inf, 0.1])
    target = torch.tensor([5.0, 4e3, 8.0, 0.05], requires_grad=True)
    unit = torch.tensor([1.0, 1e4, 1.0, 0.1])
    solution = solve(
        lambda x: ((x - target) / unit).square().sum(-1),
        torch.tensor([[3.0, 0.0, 0.0, 0.0]]),
        box=Box(low, high),
        solver=Newton(),
    )
    assert solution.converged.all()
    torch.testing.assert_close(solution.x.detach(), torch.tensor([[3.0, 4e3, 8.0, 0.05]]))
    (grad,) = torch.autograd.grad(solution.x.sum(), target)
    torch.testing.assert_close(grad, torch.tensor([0.0, 1.0, 1.0, 1.0]))


def test_settings_in_units_of_x_keep_their_meaning():
    """Step sizes and standard deviations are in units of x: such solvers are called as before."""
    free = {name for name, solver in SOLVERS.items() if solver.scales}
    assert free == {
        *("projected-gradient", "projected-gradient-window", "projected-gradient-polished"),
        *("newton", "newton-cg", "gauss-newton", "ilqr", "ddp"),
    }
    assert not ProjectedGradient(first_step=0.1).scales


def landing(dtype, unit, solver=None, constrained=True, **settings):
    """A rocket of one tonne: thrust in newtons and gimbal in radians, in the given units."""
    unit = torch.tensor(unit, dtype=dtype)
    mass = torch.tensor(1000.0, dtype=dtype, requires_grad=True)

    def dynamics(s, u):
        thrust, gimbal = (u * unit).unbind(-1)
        x, y, tilt, vx, vy, turn = s.unbind(-1)
        ax, ay = thrust / mass * torch.sin(tilt + gimbal), thrust / mass * torch.cos(tilt + gimbal) - 9.81
        change = torch.stack([vx, vy, turn, ax, ay, -thrust * torch.sin(gimbal) / 1000.0], -1)
        return s + 0.1 * change

    def reward(s, u):
        effort = (u * unit - torch.tensor([9810.0, 0.0], dtype=dtype)) / torch.tensor([8192.0, 0.125], dtype=dtype)
        return -(s.square() * torch.tensor([0.1, 0.1, 5.0, 0.1, 0.1, 0.1], dtype=dtype)).sum(-1) - effort.square().sum(
            -1
        )

    low, high = torch.tensor([0.0, -0.125], dtype=dtype) / unit, torch.tensor([16384.0, 0.125], dtype=dtype) / unit
    plan = difftori.plan(
        dynamics,
        reward,
        None,
        torch.tensor([[5.0, 20.0, 0.1, 0.0, -3.0, 0.0], [-8.0, 10.0, -0.2, 1.0, -1.0, 0.1]], dtype=dtype),
        (torch.tensor([9810.0, 0.0], dtype=dtype) / unit).expand(2, 10, 2),
        low,
        high,
        solver=solver,
        constraint=(lambda s, u: s[:, 4:5] * -1 - 3.5) if constrained else None,
        **settings,
    )
    loss = (plan.actions * unit / torch.tensor([8192.0, 0.125], dtype=dtype)).sum()
    return plan, torch.autograd.grad(loss, mass)[0]


@pytest.mark.parametrize("solver", [ILQR(), Newton()], ids=["ilqr", "newton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plan_in_any_units(dtype, solver):
    scaled, wanted = landing(dtype, (8192.0, 0.125), solver)
    natural, got = landing(dtype, (1.0, 1.0), solver)
    assert natural.solution.converged.all(), natural.solution.status
    assert natural.solution.gradient_valid.all()
    assert torch.equal(natural.actions / torch.tensor([8192.0, 0.125], dtype=dtype), scaled.actions)
    assert torch.equal(natural.states, scaled.states)
    assert torch.equal(got, wanted)


def test_the_first_order_solver_of_a_plan_in_natural_units():
    """In the task's own units this row stopped at its start and was called converged."""
    best, _ = landing(torch.float32, (1.0, 1.0), Newton(), constrained=False)
    plan, _ = landing(torch.float32, (1.0, 1.0), ProjectedGradient(), constrained=False, max_steps=1000)
    assert bool((plan.value >= best.value - 1e-2 * best.value.abs()).all()), (plan.value, best.value)


@pytest.mark.parametrize("linear", ["dense", "riccati"])
def test_the_adjoints_of_a_plan_agree_in_natural_units(linear):
    adjoint = Implicit(linear=linear)
    _, got = landing(torch.float64, (1.0, 1.0), Newton(), constrained=False, adjoint=adjoint)
    _, wanted = landing(torch.float64, (8192.0, 0.125), Newton(), constrained=False)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
