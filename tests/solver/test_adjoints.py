"""Every adjoint with every solver, against finite differences, closed forms, and one another."""

from dataclasses import replace

import pytest
import torch

from difftori.objectives import ReturnObjective
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
    ProjectedGradient,
    Status,
    TrajectoryObjective,
    Truncated,
    Unrolled,
    check_gradients,
    solve,
)
from difftori.solver.interface import Problem
from tests.support.problems import CASES, F64, Network, lqr, network, quadratic, swing
from tests.support.solvers import SECOND_ORDER, SOLVERS, STACKED, applies

# Solvers that come to an optimum slowly: tried on one problem, with a loose tolerance.
SLOW = {"adam", "gradient-descent", "lm-adaptive", "lm-fixed"}
SAMPLING = {"cem", "mppi"}
IMPLICIT = {"dense": Implicit(), "cg": Implicit(linear="cg", products=40)}


def gradients(case, solution):
    weights = torch.linspace(-1, 1, solution.x.numel(), dtype=F64).reshape(solution.x.shape)
    return torch.autograd.grad((solution.x * weights).sum(), case.leaves, allow_unused=True)


@pytest.mark.parametrize("problem", CASES)
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in SAMPLING])
@pytest.mark.parametrize("linear", IMPLICIT)
def test_implicit_gradient_against_finite_differences(linear, name, problem):
    case = CASES[problem]()
    if not applies(name, case.objective) or (name in SLOW and problem != "quadratic"):
        pytest.skip(f"{name} needs another structure, or is too slow here")
    check = check_gradients(
        case.objective,
        case.x0,
        solver=SOLVERS[name],
        adjoint=IMPLICIT[linear],
        box=case.box,
        max_steps=200,
        directions=2,
        epsilon=1e-4,
    )
    assert check.relative_error < (5e-2 if name in SLOW else 1e-3), check


@pytest.mark.parametrize(
    "solver",
    [CEM(samples=256, elites=16, min_std=1e-4), MPPI(samples=256, elites=16, std=0.3, min_std=1e-4, temperature=50.0)],
)
@pytest.mark.parametrize("linear", IMPLICIT)
def test_implicit_gradient_after_sampling(linear, solver):
    """Samplers end near the optimum, not at it; the implicit gradient there is near the true one."""
    case = quadratic(scale=0.2)  # an optimum inside: a mean of samples never lies on a bound
    exact = gradients(case, solve(case.objective, case.x0, solver=Newton(), box=case.box))
    generator = torch.Generator().manual_seed(0)
    solution = solve(
        case.objective,
        case.x0,
        solver=solver,
        adjoint=IMPLICIT[linear],
        box=case.box,
        max_steps=40,
        generator=generator,
    )
    sampled = gradients(case, solution)
    for a, b in zip(sampled, exact, strict=True):
        assert float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) > 0.95


@pytest.mark.parametrize("problem", CASES)
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in SAMPLING])
def test_unrolled_gradient_is_that_of_what_was_computed(name, problem):
    case = CASES[problem]()
    if not applies(name, case.objective):
        pytest.skip(f"{name} needs another structure")
    if problem == "network" and name in SECOND_ORDER:
        pytest.skip("where the cost is not convex, Newton's added curvature counts as a constant")
    solver = SOLVERS[name]
    check = check_gradients(
        case.objective,
        case.x0,
        solver=replace(solver, exact_unrolling=True) if isinstance(solver, ProjectedGradient) else solver,
        adjoint=Unrolled(),
        box=case.box,
        max_steps=3,
        directions=3,
        epsilon=1e-6,
    )
    assert check.relative_error < 1e-5, check


def logarithm_error(solver):
    """The relative error of d(log t)/dt where the unrolled solve converged, and in how many of the 16 rows it did and is valid."""
    t = (3 * torch.rand(16, 6, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.3).requires_grad_()
    cost = lambda x: (x.exp() - t).square().sum(-1)  # noqa: E731
    solution = solve(cost, torch.zeros_like(t), solver=solver, box=Box(-5.0, 5.0), max_steps=300, adjoint=Unrolled())
    (found,) = torch.autograd.grad(solution.x.sum(), t)
    converged, valid = solution.converged, solution.gradient_valid
    return (found * t.detach() - 1)[converged].abs().max().item(), int(converged.sum()), int((converged & valid).sum())


@pytest.mark.parametrize(
    "name", [name for name in SOLVERS if name not in SAMPLING | STACKED and name not in ("adam", "ilqr", "ddp")]
)
def test_the_unrolled_gradient_of_a_converged_solve_is_that_of_the_optimum(name):
    error, count, valid = logarithm_error(SOLVERS[name])
    assert error < 1e-3
    assert count == valid > 0


def test_with_differentiated_step_lengths_it_is_not():
    error, count, valid = logarithm_error(ProjectedGradient(exact_unrolling=True))
    assert error > 1
    assert valid < count


def test_unrolled_mppi_follows_its_weights():
    case = quadratic()
    options = dict(box=case.box, max_steps=2, solver=MPPI(samples=64, elites=64, std=0.5), adjoint=Unrolled())

    def value():
        return solve(case.objective, case.x0, generator=torch.Generator().manual_seed(0), **options).x.sum()

    (grad,) = torch.autograd.grad(value(), case.leaves[1])
    direction = torch.ones_like(grad)
    with torch.no_grad():
        q = case.leaves[1]
        q += 1e-6 * direction
        above = value()
        q -= 2e-6 * direction
        below = value()
    torch.testing.assert_close((grad * direction).sum(), (above - below) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["projected-gradient", "lm-fixed", "adam", "newton", "ilqr"])
def test_truncated_at_full_length_is_unrolled(name):
    case = swing()
    options = dict(solver=SOLVERS[name], box=case.box, max_steps=4, tolerance=0.0)
    full = gradients(case, solve(case.objective, case.x0, adjoint=Unrolled(), **options))
    cut = gradients(case, solve(case.objective, case.x0, adjoint=Truncated(4), **options))
    for a, b in zip(full, cut, strict=True):
        torch.testing.assert_close(a, b)


def test_truncated_is_the_unrolled_gradient_of_its_tail():
    case = network()
    solver = LevenbergMarquardt(offset=30.0, damping=5.0, step_size=0.02)
    options = dict(solver=solver, tolerance=0.0, keep="last")
    whole = solve(case.objective, case.x0, adjoint=Truncated(3), max_steps=10, **options)
    middle = solve(case.objective, case.x0, adjoint=Detached(), max_steps=7, **options)
    tail = solve(case.objective, middle.x, adjoint=Unrolled(), max_steps=3, **options)
    torch.testing.assert_close(whole.x, tail.x)
    for a, b in zip(gradients(case, whole), gradients(case, tail), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("solver", [ILQR(), ILQR(second_order=True), Newton(), ProjectedGradient(polish=1)])
@pytest.mark.parametrize("adjoint", [Implicit(), Implicit(linear="cg", products=80), Unrolled()])
def test_lqr_against_riccati(solver, adjoint):
    objective, leaves = lqr()
    exact = objective.riccati()
    solution = solve(objective, torch.zeros_like(exact), solver=solver, adjoint=adjoint, max_steps=30, tolerance=1e-12)
    torch.testing.assert_close(solution.x, exact, rtol=0, atol=1e-8)
    weights = torch.linspace(-1, 1, exact.numel(), dtype=F64).reshape(exact.shape)
    expected = torch.autograd.grad((exact * weights).sum(), leaves)
    found = torch.autograd.grad((solution.x * weights).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * max(1.0, float(b.abs().max())))
    assert solution.gradient_valid.all()


def test_held_coordinates_have_no_derivative():
    case = quadratic(scale=8.0)
    solution = solve(case.objective, case.x0, box=case.box, solver=Newton())
    held = solution.x.abs() == 1
    assert bool(held.any())
    assert not bool(held.all())
    (grad,) = torch.autograd.grad(solution.x[held].sum(), case.leaves[1])
    assert float(grad.abs().max()) == 0


def test_hessian_products_through_layer_norm():
    """Reverse-over-forward through torch's layer_norm is silently wrong; ours must match finite differences of g."""
    from difftori.solver.derivatives import value_and_grad, value_grad_hessian
    from difftori.solver.interface import Problem
    from difftori.solver.newton import HessianProducts

    case = network()
    x = 0.3 * torch.randn(case.x0.shape, dtype=F64)
    v = torch.randn_like(x)
    step = 1e-6
    _, above = value_and_grad(case.objective, x + step * v)
    _, below = value_and_grad(case.objective, x - step * v)
    numeric = (above - below) / (2 * step)
    torch.testing.assert_close(HessianProducts(Problem(case.objective, Box()), x)(v), numeric, rtol=1e-6, atol=1e-8)
    _, _, hessian = value_grad_hessian(case.objective, x)
    torch.testing.assert_close((hessian @ v.unsqueeze(-1)).squeeze(-1), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("adjoint", [Detached(), Unrolled(), Truncated(5), Implicit(), Implicit(linear="cg")])
def test_no_graph_under_no_grad(adjoint):
    case = network()
    with torch.no_grad():
        solution = solve(case.objective, case.x0, adjoint=adjoint, box=case.box)
    assert not solution.x.requires_grad
    assert not any(t.requires_grad for t in (solution.cost, solution.grad_norm, solution.state.cost))


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit(linear="cg"), Unrolled(), Truncated(2)])
def test_no_graph_where_nothing_wants_a_gradient(adjoint):
    case = network()
    for leaf in case.leaves:
        leaf.requires_grad_(False)
    assert not solve(case.objective, case.x0, adjoint=adjoint, box=case.box, max_steps=5).x.requires_grad


def saddle():
    """Row 0 has its optimum inside; row 1 a saddle at its start, where the gradient vanishes."""
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)
    shift = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    return (lambda x: 0.5 * (sign * (x - shift).square()).sum(-1)), shift


@pytest.mark.parametrize("linear", ["dense", "cg"])
def test_a_saddle_is_flagged_and_its_gradient_bounded(linear):
    cost, shift = saddle()
    solution = solve(cost, torch.zeros(2, 2, dtype=F64), adjoint=Implicit(linear=linear))
    assert solution.gradient_valid.tolist() == [True, False]
    if linear == "dense":
        assert solution.status.tolist() == [Status.CONVERGED, Status.NOT_A_MINIMUM]
    (grad,) = torch.autograd.grad(solution.x.sum(), shift)
    torch.testing.assert_close(grad[0], torch.ones(2, dtype=F64))
    assert bool(torch.isfinite(grad).all())
    assert float(grad.abs().max()) <= 1.0 + 1e-9


def test_gradient_valid_knows_a_short_solve():
    case = quadratic()
    short = solve(case.objective, case.x0, box=case.box, max_steps=1)
    long = solve(case.objective, case.x0, box=case.box, max_steps=300)
    assert not bool(short.gradient_valid.any())
    assert bool(long.gradient_valid.all())


@pytest.mark.parametrize("linear", ["dense", "cg"])
def test_a_nan_row_does_not_reach_shared_parameters(linear):
    case = network()
    net, context = case.objective.net, case.objective.context
    good = torch.tensor([0, 2, 3])
    part = Network(net, context[good])
    expected = torch.autograd.grad(
        solve(part, case.x0[good], box=case.box, adjoint=Implicit(linear=linear)).x.sum(), list(net.parameters())[:-1]
    )
    with torch.no_grad():
        context[1] = float("nan")
    solution = solve(case.objective, case.x0, box=case.box, adjoint=Implicit(linear=linear))
    assert solution.status[1] == Status.NON_FINITE
    found = torch.autograd.grad(solution.x.sum(), list(net.parameters())[:-1])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_unrolled_rows_that_stand_still_have_finite_gradients():
    """Starting at the optimum: no move, so the spectral step divides nothing by nothing."""
    case = quadratic()
    at_optimum = solve(case.objective, case.x0, box=case.box, solver=Newton()).x.detach()
    for solver in (ProjectedGradient(), Adam(), LevenbergMarquardt(offset=1.0, adaptive=True)):
        solution = solve(
            case.objective, at_optimum, box=case.box, solver=solver, adjoint=Truncated(3), max_steps=5, tolerance=0.0
        )
        assert all(bool(torch.isfinite(g).all()) for g in gradients(case, solution) if g is not None)


@pytest.mark.parametrize("solver", [ILQR(), ILQR(second_order=True)])
@pytest.mark.parametrize("steps", [1, 2])
def test_unrolled_ilqr_of_one_time_step(steps, solver):
    """State and plan are constants here, and yet the last state depends on the dynamics' parameters."""

    class OneStep(TrajectoryObjective):
        state = torch.tensor([[0.5], [1.0]], dtype=F64)
        horizon = action_dim = 1
        discount = 0.9
        gain = torch.tensor(0.7, dtype=F64, requires_grad=True)

        def next(self, state, action, t=None):
            return state + self.gain * torch.sin(action)

        def stage_cost(self, state, action, t=None):
            return 0.3 * action.square().sum(-1)

        def terminal_cost(self, state):
            return (state.square() + 0.3 * state.pow(4)).sum(-1)

    check = check_gradients(
        OneStep(), torch.full((2, 1), 0.1, dtype=F64), solver=solver, adjoint=Unrolled(), max_steps=steps
    )
    assert check.relative_error < 1e-6, check


def test_unrolled_cem_with_one_elite_has_a_finite_gradient():
    x0 = torch.full((2, 3), 0.1, dtype=F64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    solver = CEM(samples=16, elites=1)
    solution = solve(
        lambda x: (x - 0.3).square().sum(-1), x0, solver=solver, adjoint=Unrolled(), max_steps=3, generator=generator
    )
    (grad,) = torch.autograd.grad(solution.x.sum(), x0)
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("adjoint", [Unrolled(), Truncated(2), Implicit()])
@pytest.mark.parametrize("solver", [ProjectedGradient(polish=1), Adam(), MPPI(samples=16, elites=4)])
def test_only_x_carries_a_graph(solver, adjoint):
    case = quadratic()
    solution = solve(case.objective, case.x0, solver=solver, adjoint=adjoint, box=case.box, max_steps=4)
    assert solution.x.requires_grad
    state = solution.state
    rest = [solution.cost, solution.grad_norm, state.cost, *state.memory, *([] if state.grad is None else [state.grad])]
    assert not any(t.requires_grad for t in rest)


def test_gradients_reach_the_start_through_unrolling():
    case = quadratic()
    x0 = case.x0.clone().requires_grad_()
    solution = solve(case.objective, x0, box=Box(-10.0, 10.0), adjoint=Unrolled(), max_steps=2)
    (grad,) = torch.autograd.grad(solution.x.sum(), x0)
    assert float(grad.abs().min()) > 0


def test_an_inward_box_lets_through_what_leads_inside():
    """Unrolled gradient descent that its cost drives out of the box: exactly, the loss has no slope; inward, it has one
    where descending it would bring the coordinate back, and none where it would drive it further out."""
    slope = torch.tensor([[-3.0, -3.0, 0.2]], dtype=F64, requires_grad=True)

    def gradient(box: Box) -> torch.Tensor:
        x = solve(
            lambda x: (slope * x).sum(-1),
            torch.zeros(1, 3, dtype=F64),
            solver=GradientDescent(1.0),
            adjoint=Unrolled(),
            box=box,
            max_steps=2,
            keep="last",
        ).x
        assert torch.equal(x.detach()[0, :2], torch.ones(2, dtype=F64))
        target = torch.tensor([[0.5, 2.0, 0.5]], dtype=F64)
        (grad,) = torch.autograd.grad((x - target).square().sum(), slope)
        return grad[0]

    exact, inward = gradient(Box(-1.0, 1.0)), gradient(Box(-1.0, 1.0, inward=True))
    assert exact[:2].tolist() == [0.0, 0.0]
    assert inward[0] < 0, "a step down in the loss raises the slope, and x comes down from its bound"
    assert inward[1] == 0
    assert inward[2] == exact[2] != 0


@pytest.mark.parametrize(
    ("state_dim", "action_dim", "horizon", "expected"),
    [(4, 1, 30, "riccati"), (50, 6, 5, "dense"), (50, 6, 40, "cg"), (4, 1, 10, "dense")],
)
def test_the_default_linear_solver_is_the_cheapest_for_the_size(state_dim, action_dim, horizon, expected):
    """A sweep takes derivatives in every state dimension: with a latent of 50 it costs more than conjugate gradients."""
    state = torch.zeros(1, state_dim, dtype=F64)
    objective = ReturnObjective(lambda s, a: s, lambda s, a: a.sum(-1), None, state, horizon, action_dim)
    x = torch.zeros(1, horizon * action_dim, dtype=F64)
    assert Implicit().method(Problem(objective, Box(-1.0, 1.0)), x, carried=False) == expected


@pytest.mark.parametrize(
    "solver", [GradientDescent(0.25), ProjectedGradient(first_step=0.25)], ids=lambda s: type(s).__name__
)
def test_without_a_tolerance_a_start_at_the_optimum_has_a_derivative(solver):
    """Its gradient is exactly zero, and the row takes all its steps all the same."""
    target = torch.tensor([[0.5, -0.25]], requires_grad=True)
    start = target.detach().clone()
    solution = solve(
        lambda x: (x - target).square().sum(-1), start, solver=solver, adjoint=Unrolled(), tolerance=0.0, max_steps=1
    )
    assert torch.equal(solution.x, start)
    assert solution.converged.all()
    (grad,) = torch.autograd.grad(solution.x.sum(), target)
    torch.testing.assert_close(grad, torch.full_like(grad, 0.5))


@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.parametrize("corner", [False, True])
def test_steps_at_a_first_order_point_do_not_amplify_the_derivative(corner, steps):
    """A spectral step that grew fourfold at each of them made the loss's gradient useless: `difftori demo` learned a tenth as well."""
    target = torch.tensor([[0.5, -0.25]], dtype=F64, requires_grad=True)
    slope = lambda x: -(2 * target * x).sum(-1)  # noqa: E731
    cost = slope if corner else lambda x: (x - target).square().sum(-1)
    solution = solve(
        cost,
        target.detach().sign() if corner else target.detach().clone(),
        box=Box(-1.0, 1.0, inward=True),
        solver=ProjectedGradient(first_step=0.25),
        adjoint=Unrolled(),
        tolerance=0.0,
        max_steps=steps,
    )
    (grad,) = torch.autograd.grad((solution.x * target.detach().sign()).sum(), target)
    expected = 0.5 * steps if corner else 1 - 0.5**steps
    torch.testing.assert_close(grad, expected * target.detach().sign())


def unrolled(start=None, *, dtype=F64, tolerance=None, steps=400, solver=None, adjoint=None):
    """16 quadratic problems of condition 100: the solution, and each row's relative error of an unrolled derivative."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 12, 12, generator=generator, dtype=F64))[0]
    hessian = ((basis * torch.logspace(0, 2, 12, dtype=F64)) @ basis.mT).to(dtype)
    target, weight = (torch.randn(16, 12, generator=generator, dtype=dtype) for _ in range(2))
    target.requires_grad_()
    optimum = torch.linalg.solve(hessian, target.detach())
    solution = solve(
        lambda x: 0.5 * torch.einsum("bi,bij,bj->b", x, hessian, x) - (x * target).sum(-1),
        torch.zeros_like(optimum) if start is None else optimum + start,
        solver=solver,
        adjoint=adjoint or Unrolled(),
        max_steps=steps,
        tolerance=tolerance,
    )
    found = torch.zeros_like(target)
    if solution.x.requires_grad:
        (found,) = torch.autograd.grad((solution.x * weight).sum(), target)
    wanted = torch.linalg.solve(hessian, weight)
    return solution, (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dtype": torch.float32},
        {"start": 1e-4},
        {"solver": GradientDescent(0.015), "steps": 3000},
        {"solver": Newton()},
        {"solver": Newton(), "start": 1.0},
        {"adjoint": Truncated(200)},
    ],
)
def test_unrolled_derivatives_that_have_converged_are_valid(case):
    solution, errors = unrolled(**case)
    assert solution.gradient_valid.all()
    assert errors.max() < 0.05


@pytest.mark.parametrize(
    "case",
    [
        {"solver": ProjectedGradient(exact_unrolling=True)},
        {"start": 0.0},
        {"start": 0.0, "solver": Newton()},
        {"adjoint": Truncated(5)},
        {"adjoint": Truncated(50)},
        {"tolerance": 1e-2},
    ],
)
def test_unrolled_derivatives_that_have_not_converged_are_not_valid(case):
    solution, errors = unrolled(**case)
    assert solution.converged.sum() >= 10
    assert errors.max() > 0.05
    assert not (solution.gradient_valid & (errors > 0.05)).any()


def test_a_direction_that_the_solve_never_tried_is_noticed():
    """The second variable starts at its optimum, so no step length was fitted to its curvature."""
    target = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=F64, requires_grad=True)
    curvature = torch.tensor([1.0, 30.0], dtype=F64)
    solution = solve(
        lambda x: (curvature * (x - target).square()).sum(-1), torch.zeros(2, 2, dtype=F64), adjoint=Unrolled()
    )
    assert solution.converged.all()
    (grad,) = torch.autograd.grad(solution.x.sum(), target)
    assert grad[0, 1].abs() > 10  # right: 1
    assert solution.gradient_valid.tolist() == [False, True]
    torch.testing.assert_close(grad[1], torch.ones(2, dtype=F64), atol=1e-3, rtol=0)


def test_a_row_held_at_a_corner_from_the_start_has_a_valid_derivative_of_zero():
    target = torch.tensor([[2.0, 3.0], [2.0, 0.5]], dtype=F64, requires_grad=True)
    start = torch.tensor([[1.0, 1.0], [1.0, 0.5]], dtype=F64)
    solution = solve(
        lambda x: (x - target).square().sum(-1), start, box=Box(-1.0, 1.0), adjoint=Unrolled(), tolerance=1e-6
    )
    assert solution.steps.tolist() == [0, 0]
    assert solution.gradient_valid.tolist() == [True, False]


@pytest.mark.parametrize("solver", [Newton(), GaussNewton(), LevenbergMarquardt(), ProjectedGradient()])
def test_unrolled_derivatives_at_bounds_are_valid(solver):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(64, 6, 5, generator=generator, dtype=F64)
    target = torch.randn(64, 6, generator=generator, dtype=F64, requires_grad=True)

    class Fit(LeastSquaresObjective):
        def residual(self, x):
            return (matrix @ x.unsqueeze(-1)).squeeze(-1) - target

    def learn(adjoint):
        start = torch.zeros(64, 5, dtype=F64)
        found = solve(Fit(), start, solver=solver, box=Box(-0.3, 0.3), adjoint=adjoint, max_steps=300)
        (grad,) = torch.autograd.grad((found.x * torch.linspace(-1, 1, 5, dtype=F64)).sum(), target)
        return found, grad

    (solution, found), (_, wanted) = learn(Unrolled()), learn(Implicit())
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-9)
    assert (solution.x.abs() == 0.3).any(-1).sum() > 20
    assert error[solution.gradient_valid].max() < 0.02
    right = solution.converged & (error < 1e-3)
    assert right.sum() > 50
    assert solution.gradient_valid[right].all()


def test_a_flat_direction_that_the_loss_hardly_asks_for_counts_by_its_derivative():
    target = torch.tensor([[1.0, 0.0]], dtype=F64, requires_grad=True)
    curvature = torch.tensor([100.0, 1.0], dtype=F64)
    solution = solve(
        lambda x: (0.5 * curvature * x * x - target * x).sum(-1),
        torch.zeros(1, 2, dtype=F64),
        solver=GradientDescent(0.009),
        max_steps=300,
        tolerance=1e-6,
        adjoint=Unrolled(),
    )
    (grad,) = torch.autograd.grad((solution.x * torch.tensor([1.0, 0.009], dtype=F64)).sum(), target)
    assert solution.converged.all()
    assert grad[0, 1] < 0.001  # right: 0.009
    assert not solution.gradient_valid.any()


def test_one_step_of_newtons_is_enough_only_for_a_quadratic_cost():
    target = torch.full((1, 1), 1.2, dtype=F64, requires_grad=True)
    start = torch.zeros(1, 1, dtype=F64)
    options = {"solver": Newton(), "max_steps": 1, "adjoint": Unrolled()}
    for cost, valid in (
        (lambda x: (x.exp() - target * x).sum(-1), False),
        (lambda x: (x - target).square().sum(-1), True),
    ):
        solution = solve(cost, start, **options)
        solution.x.sum().backward()
        assert solution.gradient_valid.tolist() == [valid]


def test_several_backward_passes_at_once_are_possible_and_not_measured():
    target = torch.tensor([[0.5, 1.0], [0.7, 1.3]], dtype=F64)

    def solved(t):
        return solve(lambda x: (x.exp() - t * x).sum(-1), torch.zeros(2, 2, dtype=F64), adjoint=Unrolled()).x

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(solved, target, vectorize=True), jacobian(solved, target))


def test_the_measurement_changes_no_derivative():
    """A solve with a tolerance that is never reached, and the same one without, whose derivative is not measured."""
    case = swing()
    for solver in (ProjectedGradient(), Adam(), Newton(), ILQR()):
        options = dict(solver=solver, box=case.box, max_steps=4, adjoint=Unrolled(), keep="last")
        measured, plain = (solve(case.objective, case.x0, tolerance=t, **options) for t in (1e-14, 0.0))
        for a, b in zip(gradients(case, measured), gradients(case, plain), strict=True):
            torch.testing.assert_close(a, b)


def test_the_worst_of_several_backward_passes_counts_and_memory_does_not_grow():
    """Only the second variable, which starts at its optimum, has a wrong derivative."""
    target = torch.tensor([[1.0, 0.0]], dtype=F64, requires_grad=True)
    curvature = torch.tensor([1.0, 30.0], dtype=F64)
    solution = solve(
        lambda x: (curvature * (x - target).square()).sum(-1), torch.zeros(1, 2, dtype=F64), adjoint=Unrolled()
    )
    for variable, valid in ((0, True), (1, False), (0, False)):
        torch.autograd.grad(solution.x[0, variable], target, retain_graph=True)
        assert solution.gradient_valid.tolist() == [valid]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("half", [False, True], ids=["start-at-zero", "start-optimal-in-half-of-the-directions"])
def test_the_numbers_of_the_documentation(half, dtype):
    """192 quadratic problems of 12 variables and condition number 100 (docs/solver.md, "Step lengths of Unrolled()")."""
    errors, valid = [], []
    for seed in range(12):
        torch.manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(16, 12, 12, dtype=F64))[0]
        hessian = ((basis * torch.logspace(0, 2, 12, dtype=F64)) @ basis.mT).to(dtype)
        target = torch.randn(16, 12, dtype=dtype, requires_grad=True)
        along = (basis.mT @ torch.linalg.solve(hessian, target.detach())[..., None].to(F64))[..., 0]
        start = (basis @ (along * (torch.arange(12) >= 6))[..., None])[..., 0].to(dtype) * half
        solution = solve(
            lambda x, h=hessian, t=target: 0.5 * torch.einsum("bi,bij,bj->b", x, h, x) - (x * t).sum(-1),
            start,
            adjoint=Unrolled(),
            max_steps=600,
        )
        weight = torch.randn(16, 12, dtype=dtype)
        (found,) = torch.autograd.grad((solution.x * weight).sum(), target)
        wanted = torch.linalg.solve(hessian, weight)
        errors.append((found - wanted).norm(dim=-1) / wanted.norm(dim=-1))
        valid.append(solution.gradient_valid)
    error, trusted = torch.cat(errors), torch.cat(valid)
    if half:
        assert (error > 0.05).all()
        assert not trusted.any()
    elif dtype == F64:
        assert trusted.all()
        assert error.max() < 1e-5
    else:
        assert trusted.sum() >= 175
        assert error[trusted].max() < 0.01
