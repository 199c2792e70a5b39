"""Every solver on every problem it applies to: it descends, stays in the box, and treats rows alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difftori.solver import (
    CEM,
    Adam,
    Box,
    Detached,
    LevenbergMarquardt,
    ProjectedGradient,
    Status,
    solve,
)
from difftori.solver.host_reads import all_steps
from tests.support.problems import CASES, F64, fit, network, quadratic, swing
from tests.support.solvers import SECOND_ORDER, SOLVERS, STACKED, applies


def best_known(case) -> torch.Tensor:
    """The cost of a long solve polished by Newton's method."""
    return solve(
        case.objective,
        case.x0,
        solver=ProjectedGradient(polish=5, window=5),
        adjoint=Detached(),
        box=case.box,
        max_steps=500,
    ).cost


def run(name, case, steps=150, **options):
    generator = torch.Generator().manual_seed(0)
    return solve(
        case.objective,
        case.x0,
        solver=SOLVERS[name],
        adjoint=Detached(),
        box=case.box,
        max_steps=steps,
        generator=generator,
        **options,
    )


@pytest.mark.parametrize("problem", CASES)
@pytest.mark.parametrize("name", SOLVERS)
def test_reaches_the_optimum(name, problem):
    case = CASES[problem]()
    if not applies(name, case.objective):
        pytest.skip(f"{name} needs another structure")
    solution = run(name, case)
    gap = solution.cost - best_known(case)
    first = solve(case.objective, case.x0, adjoint=Detached(), box=case.box, max_steps=0).cost
    scale = first - best_known(case)
    assert bool((gap <= 2e-2 * scale + 1e-9).all()), (gap / scale).tolist()
    if name in SECOND_ORDER:
        assert float(solution.grad_norm.max()) < 1e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_every_iterate_is_inside_the_box(name):
    case = fit() if name in STACKED else swing()
    box = Box(-0.3, torch.linspace(0.1, 0.6, case.x0.shape[1], dtype=F64))
    case.box = box
    solution = run(name, case, steps=15, history=True)
    assert solution.history is not None
    assert bool(box.contains(solution.history.x.flatten(0, 1)).all())
    assert bool(box.contains(solution.x).all())


@pytest.mark.parametrize(("solver", "extra"), [(ProjectedGradient(), 0), (ProjectedGradient(polish=2), 1), (Adam(), 0)])
def test_the_history_is_the_start_and_one_entry_a_step(solver, extra):
    """And one more for the solver's last refinement, where it has one."""
    case = swing()
    solution = solve(case.objective, case.x0, solver=solver, box=case.box, max_steps=4, tolerance=0.0, history=True)
    assert solution.history is not None
    assert torch.equal(solution.history.x[0], case.x0)
    assert len(solution.history.x) == len(solution.history.cost) == 1 + 4 + extra


@pytest.mark.parametrize("name", ["projected-gradient", "newton", "lm-adaptive", "ilqr", "ddp"])
def test_costs_never_rise(name):
    solution = run(name, swing(), steps=30, history=True)
    assert solution.history is not None
    assert float(solution.history.cost.diff(dim=0).max()) <= 1e-12


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.monotone])
def test_a_monotone_solver_stays_where_the_cost_is_finite(name):
    """Nothing checks its steps. The cost has its minimum at −1, and is NaN or infinite below .2."""

    def cost(x):
        return (x + 1).square().sum(-1) + torch.where(x[:, 0] > 0.2, 0.0, torch.tensor([torch.nan, torch.inf] * 2))

    x0 = torch.tensor([[0.5, 1.0], [0.21, -1.0], [3.0, 0.0], [0.1, 1.0]], dtype=F64)
    solution = solve(cost, x0, solver=SOLVERS[name], adjoint=Detached(), max_steps=25, tolerance=0.0, history=True)
    assert solution.history is not None
    assert solution.status.tolist() == [Status.MAX_STEPS] * 3 + [Status.NON_FINITE]
    costs = solution.history.cost[:, :3]
    assert float(costs.diff(dim=0).max()) <= 1e-12
    assert torch.equal(solution.cost[:3], costs.amin(0))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_best_iterate_is_kept(name):
    case = fit() if name in STACKED else swing()
    solution = run(name, case, steps=20, history=True)
    assert solution.history is not None
    torch.testing.assert_close(solution.cost, solution.history.cost.amin(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.cost, case.objective.cost(solution.x).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
@given(order=st.permutations(range(4)), alone=st.integers(0, 3))
def test_rows_do_not_interact(name, order, alone):
    case = fit() if name in STACKED else swing()
    steps = 5
    whole = run(name, case, steps)
    index = torch.tensor(order)
    shuffled = solve(
        case.objective.select(index),
        case.x0[index],
        solver=SOLVERS[name],
        adjoint=Detached(),
        box=case.box,
        max_steps=steps,
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(shuffled.x, whole.x[index], rtol=0, atol=1e-9)
    one = torch.tensor([alone])
    single = solve(
        case.objective.select(one),
        case.x0[one],
        solver=SOLVERS[name],
        adjoint=Detached(),
        box=case.box,
        max_steps=steps,
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(single.x[0], whole.x[alone], rtol=0, atol=1e-9)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_bad_row_leaves_the_others_exact(name, poison):
    case = fit() if name in STACKED else (swing() if name in ("ilqr", "ddp") else quadratic())
    clean = run(name, case, steps=20)
    # A leaf with one entry per row is spoilt in row 1.
    leaf = case.leaves[1]
    with torch.no_grad():
        leaf[1] = poison
    spoilt = run(name, case, steps=20)
    assert spoilt.status[1] == Status.NON_FINITE
    good = torch.tensor([0, 2, 3])
    assert torch.equal(spoilt.x[good], clean.x[good])
    assert torch.equal(spoilt.status[good], clean.status[good])
    assert bool(torch.isfinite(spoilt.x).all())
    assert bool(case.box.contains(spoilt.x).all())


def test_a_nan_start_is_reported():
    case = quadratic()
    case.x0[2, 1] = float("nan")
    solution = run("projected-gradient", case)
    assert solution.status.tolist()[2] == Status.NON_FINITE
    assert bool(torch.isfinite(solution.x).all())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e10, 1e20])
def test_the_unit_of_the_cost_does_not_matter(scale):
    weights = torch.tensor([1.0, 5.0], dtype=F64)
    solution = solve(lambda x: scale * (weights * (x - 0.3).square()).sum(-1), torch.zeros(1, 2, dtype=F64))
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.x, torch.full((1, 2), 0.3, dtype=F64), rtol=0, atol=1e-6)


def test_far_from_zero_a_small_gradient_is_still_seen():
    """x − P(x − g) written so would be 0 here: g is less than half the spacing of float32 at 10,000."""
    x0 = torch.full((1, 1), 1e4 - 1.0)
    solution = solve(lambda x: 1e-3 * (x - 1e4).square().sum(-1), x0, adjoint=Detached(), max_steps=0)
    assert solution.status.tolist() == [Status.MAX_STEPS]
    torch.testing.assert_close(solution.grad_norm, 2e-3 * (1e4 - x0[:, 0]))


@given(seed=st.integers(0, 10_000), low=st.sampled_from([-1.0, -float("inf")]))
def test_the_projected_gradient_is_the_move_of_a_projected_step(seed, low):
    generator = torch.Generator().manual_seed(seed)
    box = Box(low, torch.tensor([1.0, 0.5, float("inf")], dtype=F64))
    x = box.project(2 * torch.randn(4, 3, generator=generator, dtype=F64))
    grad = torch.randn(4, 3, generator=generator, dtype=F64)
    torch.testing.assert_close(box.projected_gradient(x, grad), x - box.project(x - grad))


@given(seed=st.integers(0, 10_000))
def test_converged_means_stationary(seed):
    case = quadratic(seed=seed)
    solution = solve(case.objective, case.x0, box=case.box, adjoint=Detached(), max_steps=300, tolerance=1e-7)
    _, grad = value(case, solution.x)
    residual = case.box.stationarity(solution.x, grad)
    steepest = torch.linalg.eigvalsh(case.leaves[0]).amax(-1)  # the tolerance is a distance; x is of size 1
    assert bool((residual <= 1e-7 * steepest)[solution.converged].all())
    torch.testing.assert_close(residual, solution.grad_norm)
    assert float(solution.converged.double().mean()) == 1.0


def value(case, x):
    x = x.detach().requires_grad_()
    cost = case.objective.cost(x)
    return cost, torch.autograd.grad(cost.sum(), x)[0]


def test_float32_and_float64_agree():
    low, high = network(dtype=torch.float32), network(dtype=F64)
    torch.manual_seed(0)
    with torch.no_grad():
        for a, b in zip(low.leaves, high.leaves, strict=True):
            a.copy_(b)
    x32 = run("projected-gradient-polished", low).x
    assert x32.dtype == torch.float32
    torch.testing.assert_close(x32.double(), run("projected-gradient-polished", high).x, rtol=0, atol=1e-4)


def test_a_warm_start_needs_fewer_steps():
    case = quadratic()
    cold = run("projected-gradient", case, steps=300)
    warm = solve(case.objective, cold.x, box=case.box, adjoint=Detached(), max_steps=300)
    assert int(warm.steps.max()) < int(cold.steps.min())


def test_stacked_residuals_by_either_system_agree():
    from difftori.solver.levenberg_marquardt import damped_step

    torch.manual_seed(0)
    residual, jacobian, damping = (
        torch.randn(3, 4, dtype=F64),
        torch.randn(3, 4, 9, dtype=F64),
        torch.ones(3, dtype=F64),
    )
    wide = damped_step(residual, jacobian, damping)
    eye = torch.eye(9, dtype=F64)
    direct = -torch.linalg.solve(
        jacobian.mT @ jacobian + damping[:, None, None] * eye, (jacobian.mT @ residual.unsqueeze(-1)).squeeze(-1)
    )
    torch.testing.assert_close(wide, direct)


def test_the_closed_form_is_levenberg_marquardt_on_one_residual():
    case = network()
    offset, alpha, damping = 100.0, 1e-3, 0.1
    solution = solve(
        case.objective,
        case.x0,
        solver=LevenbergMarquardt(offset=offset, step_size=alpha, damping=damping),
        adjoint=Detached(),
        max_steps=3,
        keep="last",
    )
    x = case.x0
    for _ in range(3):
        cost, grad = value(case, x)
        residual, jacobian = (offset + cost).unsqueeze(-1), grad.unsqueeze(-2)
        matrix = jacobian.mT @ jacobian + damping * torch.eye(x.shape[1], dtype=F64)
        x = x - alpha * torch.linalg.solve(matrix, (jacobian.mT @ residual.unsqueeze(-1)).squeeze(-1)).detach()
    torch.testing.assert_close(solution.x, x)


def test_candidates_are_scored_beside_the_samples():
    case = quadratic()
    best = run("newton", case).x
    solver = CEM(samples=8, elites=1, std=0.01)
    solution = solve(
        case.objective,
        case.x0,
        solver=solver,
        adjoint=Detached(),
        box=case.box,
        max_steps=1,
        candidates=best.unsqueeze(0),
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(solution.x, best)


def test_without_a_tolerance_a_solve_takes_all_its_steps_on_the_cpu_too():
    """Also from the optimum, as on a GPU, where nothing is read."""
    evaluations = 0

    def cost(x):
        nonlocal evaluations
        evaluations += 1
        return (x - 0.5).square().sum(-1)

    start = torch.full((2, 3), 0.5, dtype=F64)
    options = {"tolerance": 0.0, "max_steps": 20, "adjoint": Detached()}
    solve(cost, start, **options)  # which checks once that rows are independent
    evaluations = 0
    still = solve(cost, start, **options)
    assert still.steps.tolist() == [20, 20]
    assert still.x.equal(start)
    taken, evaluations = evaluations, 0
    with all_steps():
        assert solve(cost, start, **options).x.equal(start)
    assert evaluations == taken >= 20
    lost = solve(lambda x: x.sum(-1) * torch.nan, start, **options)
    assert lost.steps.tolist() == [0, 0]
    with all_steps():
        assert solve(lambda x: x.sum(-1) * torch.nan, start, **options).x.equal(start)
