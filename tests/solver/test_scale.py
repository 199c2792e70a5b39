"""The scale of a cost changes neither x, nor the status, nor the steps: every solver, both precisions, row by row."""

import pytest
import torch

import difftori
from difftori.solver import (
    CEM,
    ILQR,
    MPPI,
    Adam,
    Box,
    Detached,
    GaussNewton,
    GradientDescent,
    Implicit,
    LeastSquaresObjective,
    LevenbergMarquardt,
    Newton,
    Objective,
    ProjectedGradient,
    Status,
    solve,
)

EXACT = [2.0**-26, 2.0**34]
"""About 1e-8 and 1e10, and even powers of two: nothing is rounded otherwise, so the results are equal to the bit."""
ROUNDED = [1e-8, 1e-3, 1e5, 1e10]

SOLVERS = {
    "projected-gradient": lambda s: ProjectedGradient(),
    "projected-gradient-window": lambda s: ProjectedGradient(window=5),
    "projected-gradient-polished": lambda s: ProjectedGradient(polish=2),
    "projected-gradient-polished-cg": lambda s: ProjectedGradient(polish=1, polish_with=Newton(linear="cg")),
    "newton": lambda s: Newton(),
    "newton-cg": lambda s: Newton(linear="cg"),
    "adam": lambda s: Adam(lr=0.05),
    "gauss-newton": lambda s: GaussNewton(),
    "lm-stacked": lambda s: LevenbergMarquardt(damping=0.01),
    "lm-stacked-adaptive": lambda s: LevenbergMarquardt(damping=0.01, adaptive=True),
    "cem": lambda s: CEM(samples=32, elites=4),
}
IN_UNITS_OF_THE_COST = {
    "gradient-descent": lambda s: GradientDescent(0.05 / s),
    "projected-gradient-first-step": lambda s: ProjectedGradient(first_step=0.1 / s),
    "mppi": lambda s: MPPI(samples=32, elites=8, temperature=0.5 / s),
    "lm-offset": lambda s: LevenbergMarquardt(offset=30.0 * s, damping=5.0 * s**2, step_size=0.02),
    "lm-offset-adaptive": lambda s: LevenbergMarquardt(
        offset=10.0 * s, damping=0.1 * s**2, step_size=0.5, adaptive=True
    ),
}
EVERY = {**SOLVERS, **IN_UNITS_OF_THE_COST}


class Bumpy(LeastSquaresObjective):
    """A sum of squares that is neither quadratic nor solved at zero; row i is multiplied by scale[i]."""

    def __init__(self, scale: torch.Tensor):
        generator = torch.Generator().manual_seed(0)
        self.A = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64).to(scale)
        self.b = torch.randn(4, 6, generator=generator, dtype=torch.float64).to(scale)
        self.root = scale.sqrt()

    def residual(self, x):
        bent = torch.tanh((self.A @ x.unsqueeze(-1)).squeeze(-1)) - self.b
        return self.root[:, None] * torch.cat([bent, 0.5 * x], -1)


class Plain(Objective):
    """The same, without its structure."""

    def __init__(self, inner: Bumpy):
        self.inner = inner

    def cost(self, x):
        return self.inner.cost(x)


def run(name: str, scale: torch.Tensor | float, dtype: torch.dtype, box: Box | None):
    rows = torch.as_tensor(scale, dtype=dtype).expand(4)
    objective = Bumpy(rows)
    return solve(
        objective if name in ("gauss-newton", "lm-stacked", "lm-stacked-adaptive") else Plain(objective),
        torch.zeros(4, 3, dtype=dtype),
        solver=EVERY[name](scale),
        box=box,
        adjoint=Detached(),
        max_steps=60,
        generator=torch.Generator().manual_seed(0),
    )


BOXES = {"open": None, "box": Box(-1.0, torch.tensor([1.0, 0.2, 0.5])), "narrow": Box(-1e-3, 1.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("name", EVERY)
def test_scaling_a_cost_changes_nothing(name, box, dtype):
    plain = run(name, 1.0, dtype, BOXES[box])
    if "projected" in name or "newton" in name:
        assert bool(plain.converged.all()), (plain.status.tolist(), plain.grad_norm.tolist())
    for scale in EXACT:
        scaled = run(name, scale, dtype, BOXES[box])
        assert torch.equal(scaled.x, plain.x)
        assert torch.equal(scaled.status, plain.status)
        assert torch.equal(scaled.steps, plain.steps)
        assert torch.equal(scaled.gradient_valid, plain.gradient_valid)
    for scale in ROUNDED:
        scaled = run(name, scale, dtype, BOXES[box])
        rounding = {"atol": 1e-3 if dtype == torch.float32 else 1e-6, "rtol": 0}
        converged = plain.converged & scaled.converged
        torch.testing.assert_close(scaled.x[converged], plain.x[converged], **rounding)
        if "projected" in name or "newton" in name:
            assert bool(converged.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOLVERS)
def test_each_row_of_a_batch_may_have_its_own_scale(name, dtype):
    scales = torch.tensor([1.0, EXACT[0], EXACT[1], 4.0], dtype=dtype)
    mixed, plain = (run(name, scale, dtype, BOXES["box"]) for scale in (scales, 1.0))
    assert torch.equal(mixed.x, plain.x)
    assert torch.equal(mixed.status, plain.status)
    assert torch.equal(mixed.steps, plain.steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [None, Newton(), ILQR(), ILQR(second_order=True)])
@pytest.mark.parametrize("scale", ROUNDED)
def test_plans_do_not_depend_on_the_scale_of_the_reward(scale, solver, dtype):

    def planned(factor):
        gain = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        plan = difftori.plan(
            lambda s, a: s + 0.3 * torch.sin(a + gain * s),
            lambda s, a: -factor * (s.square().sum(-1) + 0.1 * a.square().sum(-1)),
            lambda s: -factor * s.square().sum(-1),
            torch.tensor([[1.0], [-0.4]], dtype=dtype),
            torch.zeros(2, 5, 1, dtype=dtype),
            solver=solver,
            max_steps=100,
        )
        return plan, *torch.autograd.grad(plan.actions.square().sum(), gain)

    (plain, slope), (scaled, its_slope) = planned(1.0), planned(scale)
    assert scaled.solution.status.tolist() == plain.solution.status.tolist() == [Status.CONVERGED] * 2
    assert bool(scaled.solution.gradient_valid.all())
    single = dtype == torch.float32
    torch.testing.assert_close(scaled.actions, plain.actions, rtol=0, atol=1e-3 if single else 1e-7)
    torch.testing.assert_close(its_slope, slope, rtol=1e-2 if single else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e5, 1e10])
@pytest.mark.parametrize("linear", ["dense", "cg"])
def test_gradients_do_not_depend_on_the_scale(linear, scale, dtype):
    t = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    cost = lambda x: scale * (x[:, 0] - t) ** 2  # noqa: E731
    solution = solve(cost, torch.zeros(1, 1, dtype=dtype), box=Box(-1.0, 1.0), adjoint=Implicit(linear=linear))
    assert solution.status.tolist() == [Status.CONVERGED]
    assert bool(solution.gradient_valid.all())
    (slope,) = torch.autograd.grad(solution.x.sum(), t)
    torch.testing.assert_close(solution.x.detach(), torch.full((1, 1), 0.5, dtype=dtype))
    torch.testing.assert_close(slope, torch.ones((), dtype=dtype))


@pytest.mark.parametrize("solver", [ProjectedGradient(), Newton(), Adam()])
def test_a_warm_start_has_converged_at_once(solver):
    """The tolerance is a distance to the optimum: it does not ask how large the first gradient was."""
    A = torch.tensor([1.0, 30.0], dtype=torch.float64)

    def cost(x):
        return 1e6 * (A * (x - 0.3).square()).sum(-1) + (x - 0.1).pow(4).sum(-1)

    cold = solve(cost, torch.zeros(1, 2, dtype=torch.float64), solver=Newton(), max_steps=50)
    warm = solve(cost, cold.x, solver=solver)
    assert (warm.steps.item(), warm.status.item()) == (0, Status.CONVERGED)


def test_a_first_gradient_many_orders_too_large_says_nothing():
    """x²+ a wall at the start: a tolerance relative to the first gradient, 1e12, would call the flat part converged."""

    def cost(x):
        return (x.square() + (30 * (x - 1.5)).exp()).sum(-1)

    solution = solve(cost, torch.full((1, 1), 2.4, dtype=torch.float64), max_steps=300)
    assert solution.status.tolist() == [Status.CONVERGED]
    assert float(solution.x.abs().max()) < 1e-7


@pytest.mark.parametrize("slide", [lambda x: -x, lambda x: -x.log1p(), lambda x: -(1 + x).sqrt(), lambda x: -x * x])
@pytest.mark.parametrize("solver", [ProjectedGradient(), Newton(), Adam(), GradientDescent(0.5)])
def test_a_cost_without_a_minimum_never_converges(solver, slide):
    solution = solve(
        lambda x: slide(x).sum(-1), torch.ones(1, 1, dtype=torch.float64), solver=solver, adjoint=Detached()
    )
    assert not bool(solution.converged.any())


def test_a_start_beside_a_maximum_has_not_converged():
    x0 = torch.full((1, 1), 1e-12, dtype=torch.float64)
    solution = solve(lambda x: torch.cos(x).sum(-1), x0, adjoint=Detached(), max_steps=0)
    assert solution.status.tolist() == [Status.MAX_STEPS]


def test_a_coordinate_beside_its_bound_counts_in_full():
    """The gradient is not cut at the distance to the bound: 1e-7 away from it and pulled outwards with 100."""
    box = Box(-1.0, 1.0)
    x, grad = torch.tensor([[1.0 - 1e-4, 1.0, -1.0]]), torch.tensor([[-100.0, -5.0, -0.5]])
    assert box.stationarity(x, grad).tolist() == [100.0]
    just_inside = torch.nextafter(torch.ones(1, 3), torch.zeros(1))
    assert box.stationarity(just_inside, -grad.abs()).tolist() == [0.0]


def test_tolerance_zero_takes_all_the_steps_and_no_evaluation_more():
    calls = []

    def cost(x):
        calls.append(1)
        return (x - 0.3).pow(4).sum(-1)

    with torch.no_grad():
        solve(cost, torch.zeros(2, 3), max_steps=0, tolerance=0.0)  # which checks once that rows are independent
        assert len(calls) == 1 + 4
        calls.clear()
        solution = solve(cost, torch.zeros(2, 3), max_steps=7, tolerance=0.0)
    assert solution.steps.tolist() == [7, 7]
    assert len(calls) == 1 + 7
