"""Badly conditioned, singular and indefinite Hessians: each row is called what it is, as finely as the precision allows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difftori.solver import ILQR, Box, Implicit, Newton, Status, solve
from difftori.solver.newton import factorise

F64 = torch.float64
N = 5


def rotation(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=F64))[0]


def minimise(hessian: torch.Tensor, target: torch.Tensor):
    """min ½(x − target)ᵀH(x − target): x = target, dx/dtarget = I."""

    def cost(x):
        away = x - target
        return 0.5 * (away * (away @ hessian)).sum(-1)

    return solve(cost, torch.zeros(1, N, dtype=target.dtype), solver=Newton(), max_steps=20)


@given(
    seed=st.integers(0, 10_000),
    digits=st.floats(0, 10),
    scaling=st.floats(0, 4),
    size=st.sampled_from([1e-8, 1.0, 1e10]),
    dtype=st.sampled_from([torch.float32, F64]),
)
def test_strictly_convex_rows_are_valid_and_right(seed, digits, scaling, size, dtype):
    """Condition numbers up to 1e10 in float64 and 1e3 in float32, and variables in units up to 1e4 apart beside that."""
    condition = 10 ** (digits if dtype == F64 else 0.3 * digits)
    spread = torch.logspace(0, -torch.tensor(condition).log10().item(), N, dtype=F64)
    basis = rotation(seed)
    core = (basis * spread) @ basis.T
    unit = torch.logspace(0, scaling if dtype == F64 else 0.0, N, dtype=F64)
    hessian = (size * unit[:, None] * core * unit).to(dtype)
    target = (0.5 / unit).to(dtype).requires_grad_()
    solution = minimise(hessian, target)
    assert solution.status.item() in (Status.CONVERGED, Status.MAX_STEPS)
    assert bool(solution.gradient_valid.all())
    jacobian = torch.stack([torch.autograd.grad(x, target, retain_graph=True)[0] for x in solution.x[0]])
    # In the units of the core, where the condition number is the one asked for.
    error = (unit[:, None] * (jacobian.double() - torch.eye(N, dtype=F64)) / unit).abs().max()
    assert float(error) <= 100 * N * condition * torch.finfo(dtype).eps


@pytest.mark.parametrize("constrained", [False, True])
def test_a_row_whose_optimum_is_far_has_not_converged(constrained):
    """Curvatures of 1e-6 to 1e6: the gradient is small long before the optimum is near. The Hessian tells."""
    unit = torch.tensor([1.0, 1e3, 1e-3])
    target = torch.tensor([[0.5, 0.5, 0.5]], requires_grad=True)
    solution = solve(
        lambda x: (x / unit - target).square().sum(-1),
        0.1 * unit.expand(1, 3),
        max_steps=200,
        inequality=(lambda x: (x / unit).square().sum(-1, keepdim=True) - 0.6) if constrained else None,
    )
    assert solution.status.item() == Status.MAX_STEPS
    assert not bool(solution.gradient_valid)


@given(
    seed=st.integers(0, 10_000), size=st.sampled_from([1e-8, 1.0, 1e10]), dtype=st.sampled_from([torch.float32, F64])
)
def test_singular_rows_and_saddles_are_told_apart(seed, size, dtype):
    basis = rotation(seed)
    target = torch.full((N,), 0.3, dtype=dtype, requires_grad=True)
    for last, status in ((0.0, Status.ILL_CONDITIONED), (-0.01, Status.NOT_A_MINIMUM), (0.01, Status.CONVERGED)):
        spread = torch.tensor([1.0, 0.7, 0.3, 0.1, last], dtype=F64)
        hessian = (size * (basis * spread) @ basis.T).to(dtype)
        factor = factorise(hessian[None], torch.ones(1, N, dtype=torch.bool))
        assert bool(factor.convex) == (last > 0)
        assert bool(factor.singular) == (last == 0)
        # From the stationary point itself: a saddle is left by any solver that starts beside it.
        away = lambda x, h=hessian: 0.5 * ((x - target) * ((x - target) @ h)).sum(-1)  # noqa: E731
        solution = solve(away, target.detach()[None], solver=Newton(), max_steps=3)
        assert solution.status.item() == status
        assert bool(solution.gradient_valid.all()) == (status == Status.CONVERGED)
        (grad,) = torch.autograd.grad(solution.x.sum(), target)
        assert float(grad.abs().max()) < 1e2  # bounded, whatever the row


def test_a_cost_without_curvature_has_no_derivative():
    slope = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    solution = solve(lambda x: (slope * x).sum(-1) + x[:, 0] * 0, torch.zeros(1, 2, dtype=F64), box=Box(-1.0, 1.0))
    assert solution.status.tolist() == [Status.ILL_CONDITIONED]
    assert torch.autograd.grad(solution.x.sum(), slope)[0].tolist() == [0.0, 0.0]


@given(seed=st.integers(0, 10_000))
def test_the_factor_is_the_hessians(seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(3, N, N, generator=generator, dtype=F64) * torch.logspace(-4, 4, N, dtype=F64)
    hessian = root.mT @ root
    factor = factorise(hessian, torch.ones(3, N, dtype=torch.bool))
    if bool(factor.convex.all()):
        unit = hessian.diagonal(dim1=-1, dim2=-2).sqrt()
        rebuilt = factor.cholesky @ factor.cholesky.mT
        relative = (rebuilt - hessian) / unit.unsqueeze(-1) / unit.unsqueeze(-2)
        assert float(relative.abs().max()) < 1e-13


def twice(adjoint):
    def solution(theta):
        a, b, c = theta.unbind()

        def cost(x):
            held = -5 * x[:, 2] * (1 + a * x[:, 2])  # drives x[:, 2] to its bound
            bent = (x[:, 0] * b).sin() * x[:, 1] + 0.5 * (2 + c) * x[:, 1].square() + 0.1 * x[:, 1].pow(4)
            return a.exp() * x[:, 0].square() / 2 - x[:, 0] + bent + held

        start = torch.zeros(1, 3, dtype=F64)
        return solve(cost, start, solver=Newton(), adjoint=adjoint, box=Box(-1.0, 1.0), max_steps=50).x

    return solution


THETA = torch.tensor([0.3, 0.2, -0.1], dtype=F64, requires_grad=True)


def test_second_derivatives_with_order_2():
    assert torch.autograd.gradcheck(twice(Implicit(order=2)), (THETA,))
    assert torch.autograd.gradgradcheck(twice(Implicit(order=2)), (THETA,))


def test_order_2_has_the_same_solution_and_first_derivative():
    x, once = (twice(Implicit(order=order))(THETA) for order in (2, 1))
    assert torch.equal(x, once)
    for i in range(3):
        for a, b in zip(*(torch.autograd.grad(v[0, i], THETA, retain_graph=True) for v in (x, once)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("linear", ["dense", "cg"])
def test_a_second_derivative_is_refused_where_it_would_be_wrong(linear):
    from difftori.errors import SolverError

    x = twice(Implicit(linear=linear, products=20))(THETA)
    weight = torch.ones(3, dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad((weight * x).sum(), THETA, create_graph=True)
    (plain,) = torch.autograd.grad(twice(Implicit())(THETA).sum(), THETA)
    torch.testing.assert_close(first.detach(), plain)
    # The derivative of a derivative with respect to something that the solve does not know is a first one of the solution.
    (mixed,) = torch.autograd.grad(first.sum(), weight, retain_graph=True)
    torch.testing.assert_close(mixed.sum(), plain.sum())
    with pytest.raises(SolverError, match=r"order=2.*Unrolled"):
        torch.autograd.grad(first.sum(), THETA, retain_graph=True)
    with pytest.raises(SolverError, match=r"order=2.*Unrolled"):
        first.sum().backward()


def test_order_2_needs_the_dense_hessian():
    from difftori.errors import SolverError

    with pytest.raises(SolverError, match="order"):
        Implicit(linear="cg", order=2)
    with pytest.raises((SolverError, TypeError)):
        Implicit(order=3)


@pytest.mark.parametrize("a0", [1.05, 1.2])
def test_an_unstable_regulator_against_riccati(a0):
    import math

    import difftori

    horizon = 20
    a = torch.tensor(a0, dtype=F64, requires_grad=True)
    p = torch.ones((), dtype=F64)
    for _ in range(horizon):
        k = p * a / (1 + p)
        p = 1 + a * p * a - a * p * k
    plan = difftori.plan(
        lambda s, u: a * s + u,
        lambda s, u: -(s[..., 0].square() + u[..., 0].square()),
        lambda s: -s[..., 0].square(),
        torch.ones(1, 1, dtype=F64),
        torch.zeros(1, horizon, 1, dtype=F64),
        low=-math.inf,
        high=math.inf,
        solver=ILQR(),
    )
    assert plan.solution.status.tolist() == [Status.CONVERGED]
    assert bool(plan.solution.gradient_valid.all())
    (found,), (right,) = torch.autograd.grad(plan.actions[0, 0, 0], a), torch.autograd.grad(-k, a)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=0)
