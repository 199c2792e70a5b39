"""Variables in different units, such as newtons beside radians: results and statuses are those of the problem scaled by hand, or the
status says that the solver did not arrive.
"""

import pytest
import torch
from torch import Tensor

import difftori
from difftori.solver import ILQR, Box, GaussNewton, LeastSquaresObjective, Newton, ProjectedGradient, solve
from difftori.solver.lengths import Lengths

HAND = (8192.0, 0.125)
NATURAL = (1.0, 1.0)
FAR = {torch.float32: 1e-4, torch.float64: 1e-8}


def landing(dtype, unit, solver=None, constrained=False, hover=9810.0, **settings):
    """A rocket of one tonne: thrust in newtons and gimbal in radians, divided by `unit`. Returns the plan, its actions in newtons and
    radians, and the derivative of a loss with respect to the mass, if gradients are enabled.
    """
    unit = torch.tensor(unit, dtype=dtype)
    mass = torch.tensor(1000.0, dtype=dtype, requires_grad=True)
    weights = torch.tensor([0.1, 0.1, 5.0, 0.1, 0.1, 0.1], dtype=dtype)
    middle, scale = torch.tensor([9810.0, 0.0], dtype=dtype), torch.tensor(HAND, dtype=dtype)

    def dynamics(s, u):
        thrust, gimbal = (u * unit).unbind(-1)
        _, _, tilt, vx, vy, turn = s.unbind(-1)
        ax, ay = thrust / mass * torch.sin(tilt + gimbal), thrust / mass * torch.cos(tilt + gimbal) - 9.81
        return s + 0.1 * torch.stack([vx, vy, turn, ax, ay, -thrust * torch.sin(gimbal) / 1000.0], -1)

    def reward(s, u):
        return -(s.square() * weights).sum(-1) - ((u * unit - middle) / scale).square().sum(-1)

    plan = difftori.plan(
        dynamics,
        reward,
        None,
        torch.tensor([[5.0, 20.0, 0.1, 0.0, -3.0, 0.0], [-8.0, 10.0, -0.2, 1.0, -1.0, 0.1]], dtype=dtype),
        (torch.tensor([hover, 0.0], dtype=dtype) / unit).expand(2, 10, 2),
        torch.tensor([0.0, -0.125], dtype=dtype) / unit,
        torch.tensor([16384.0, 0.125], dtype=dtype) / unit,
        solver=solver,
        constraint=(lambda s, u: s[:, 4:5] * -1 - 3.5) if constrained else None,
        **settings,
    )
    grad = None
    if torch.is_grad_enabled():
        (grad,) = torch.autograd.grad((plan.actions * unit / scale).sum(), mass)
    return plan, plan.actions.detach() * unit, grad


@pytest.mark.parametrize("constrained", [False, True], ids=["free", "constrained"])
@pytest.mark.parametrize("hover", [9810.0, 0.0])
@pytest.mark.parametrize("solver", [ILQR(), Newton()], ids=["ilqr", "newton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plan_in_natural_units_is_that_of_scaling_by_hand(dtype, solver, hover, constrained):
    scaled, wanted, wanted_grad = landing(dtype, HAND, solver, constrained, hover)
    natural, actions, grad = landing(dtype, NATURAL, solver, constrained, hover)
    assert natural.solution.converged.all(), natural.solution.status
    assert natural.solution.gradient_valid.all()
    assert (natural.solution.steps - scaled.solution.steps).abs().max() <= 3
    error = (actions - wanted).abs() / torch.tensor(HAND, dtype=dtype)
    assert error.max() < 10 * FAR[dtype]
    torch.testing.assert_close(grad, wanted_grad, rtol=100 * FAR[dtype], atol=0)


@pytest.mark.parametrize("hover", [9810.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_first_order_solver_that_did_not_arrive_says_so(dtype, hover):
    """It stopped at its start, where the gradient per newton is small, and was called converged."""
    best, *_ = landing(dtype, HAND, Newton(), hover=hover)
    plan, *_ = landing(dtype, NATURAL, ProjectedGradient(), hover=hover)
    far = plan.value < best.value - 1e-3 * best.value.abs()
    assert far.any()
    assert not (plan.solution.converged & far).any()
    assert not (plan.solution.gradient_valid & far).any()
    without, *_ = landing(dtype, HAND, ProjectedGradient(), hover=hover)
    assert without.solution.converged.all()


class Sum(LeastSquaresObjective):
    """Σ (x − target)² / unit², with a coupling of neighbours."""

    def __init__(self, target: Tensor, unit: Tensor):
        self.target, self.unit = target, unit

    def residual(self, x: Tensor) -> Tensor:
        y = (x - self.target) / self.unit
        return torch.cat([y, 0.5 * (y[:, 1:] - y[:, :-1])], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "solver", [Newton(), Newton(linear="cg"), GaussNewton(), ProjectedGradient()], ids=lambda s: type(s).__name__
)
def test_a_loose_bound_beside_a_narrow_one(solver, dtype):
    """Ranges that are not units: the second variable has the scale 1 and a safety bound of a million."""
    high = torch.tensor([1.0, 1e6, 0.5], dtype=dtype)
    target = torch.tensor([[0.3, 0.7, -0.2]], dtype=dtype)
    solution = solve(
        Sum(target, torch.ones_like(high)), torch.zeros(1, 3, dtype=dtype), solver=solver, box=Box(-high, high)
    )
    assert solution.converged.all(), solution.steps
    assert solution.gradient_valid.all()
    torch.testing.assert_close(solution.x, target, atol=FAR[dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_and_open_variables_in_other_units(dtype):
    low, high = torch.tensor([3.0, -1e4, -torch.inf, -0.1]), torch.tensor([3.0, 1e4, torch.inf, 0.1])
    unit = torch.tensor([1.0, 1e4, 1.0, 0.1], dtype=dtype)
    target = torch.tensor([5.0, 4e3, 8.0, 0.05], dtype=dtype, requires_grad=True)
    start = torch.tensor([[3.0, 0.0, 0.0, 0.0]], dtype=dtype)
    solution = solve(lambda x: ((x - target) / unit).square().sum(-1), start, box=Box(low, high), solver=Newton())
    assert solution.converged.all()
    assert solution.gradient_valid.all()
    torch.testing.assert_close(solution.x.detach(), torch.tensor([[3.0, 4e3, 8.0, 0.05]], dtype=dtype))
    (grad,) = torch.autograd.grad(solution.x.sum(), target)
    torch.testing.assert_close(grad, torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=dtype))


def test_rows_with_other_ranges_change_nothing():
    """Row 0 has one range. Whether row 1 has different ones must not matter to it."""
    target = torch.tensor([[0.3, 0.9], [0.2, 4e3]])
    same, different = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.5, 1e4]])
    alone = solve(Sum(target[:1], same), torch.zeros(1, 2), box=Box(-same, same))
    both = solve(Sum(target, different), torch.zeros(2, 2), box=Box(-different, different))
    for part in ("x", "cost", "steps", "status", "grad_norm", "gradient_valid"):
        assert torch.equal(getattr(both, part)[:1], getattr(alone, part)), part


def test_even_rows_are_trusted_within_their_narrowest_range():
    """Whatever the ranges of other rows are: a Newton step of .3 is far for a variable at 50 with a range of 200."""
    target, high = torch.tensor([[50.0, -50.0], [0.1, 4e3]]), torch.tensor([[100.0, 100.0], [0.5, 1e4]])
    start = target + torch.tensor([[0.3, -0.2], [0.0, 0.0]])
    alone = solve(Sum(target[:1], high[:1]), start[:1], box=Box(-high[:1], high[:1]), max_steps=0)
    both = solve(Sum(target, high), start, box=Box(-high, high), max_steps=0)
    assert alone.gradient_valid.tolist() == [False]
    assert both.gradient_valid.tolist() == [False, True]


def test_a_range_beyond_every_scale_counts_as_open():
    for bound in (1e20, 1e37, 1.6e38):
        high = torch.tensor([1.0, bound])
        target = torch.tensor([[0.3, 0.7]])
        solution = solve(Sum(target, torch.ones(2)), torch.zeros(1, 2), box=Box(-high, high), solver=Newton())
        assert solution.converged.all()
        torch.testing.assert_close(solution.x, target)
    assert not Box(torch.zeros(0), torch.zeros(0)).uneven


@pytest.mark.parametrize("weight", [1e-2, 1e-4, 1e-6])
def test_a_small_cost_of_an_action_that_has_large_cross_terms(weight):
    """Mechanical power: curvatures of an action say little about its scale, so they are no units."""
    start = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = difftori.plan(
        lambda s, a: torch.stack([s[..., 0] + 0.1 * s[..., 1], s[..., 1] + 0.1 * a[..., 0]], -1),
        lambda s, a: -(a[..., 0] * s[..., 1] + weight * a[..., 0] ** 2 + s[..., 1] ** 2 + 0.1 * torch.cos(s[..., 0])),
        lambda s: -s.square().sum(-1),
        2 * start,
        torch.zeros(16, 20, 1, dtype=torch.float64),
        -1.0,
        1.0,
        solver=ILQR(),
    )
    assert plan.solution.converged.all()
    assert plan.solution.steps.max() <= 50


def test_lengths():
    """In rows with different ranges, each variable has its own length; |x| counts for variables of similar ranges only."""
    high = torch.tensor([[0.25, 1e4, 0.5, 3.0], [0.25, 0.5, 0.5, 1.0]])
    lengths = Lengths(Box(-high, high), high)
    x = torch.tensor([[0.1, 3e3, 0.0, 1.5], [0.1, 0.4, 0.0, 0.0]])
    torch.testing.assert_close(lengths.of(x), torch.tensor([[0.25, 3e3, 1.5, 1.5], [0.4, 0.4, 0.4, 0.4]]))
    torch.testing.assert_close(lengths.units, torch.tensor([[0.25, 1e4, 0.5, 3.0], [1.0, 1.0, 1.0, 1.0]]))
    even = Lengths(Box(-0.5, 0.5), x[:, :2])
    assert even.units is None
    torch.testing.assert_close(even.of(x[:, 2:]), torch.tensor([[1.5], [0.5]]))
