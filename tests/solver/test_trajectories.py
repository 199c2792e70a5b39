"""Trajectories end to end: `plan`, its structured gradient, its states and the time argument."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import difftori
from difftori.planning import trajectory_objective
from difftori.solver import (
    ILQR,
    Box,
    FunctionObjective,
    Implicit,
    Newton,
    Problem,
    ProjectedGradient,
    Status,
    solve,
)
from tests.support.problems import F64, lqr, swing

SOLVERS = {"ilqr": ILQR(), "projected-gradient": ProjectedGradient(window=5, polish=1)}


def scalar_plan(a, horizon, **settings):
    """x' = a x + u from 1, costs x² + u² and x_H²."""
    return difftori.plan(
        lambda s, u: a * s + u,
        lambda s, u: -(s[..., 0] ** 2 + u[..., 0] ** 2),
        lambda s: -(s[..., 0] ** 2),
        torch.ones(1, 1, dtype=F64),
        torch.zeros(1, horizon, 1, dtype=F64),
        low=-math.inf,
        high=math.inf,
        solver=ILQR(),
        **settings,
    )


@pytest.mark.parametrize(("factor", "horizon"), [(1.05, 200), (1.2, 200), (1.5, 20), (1.5, 200)])
def test_unstable_dynamics_over_long_horizons(factor, horizon):
    a = torch.tensor(factor, dtype=F64, requires_grad=True)
    p = torch.ones((), dtype=F64)
    for _ in range(horizon):
        k = p * a / (1 + p)
        p = 1 + a * p * a - a * p * k
    plan = scalar_plan(a, horizon)
    assert plan.solution.status.tolist() == [Status.CONVERGED]
    assert plan.solution.gradient_valid.all()
    torch.testing.assert_close(plan.actions[0, 0, 0], -k, rtol=1e-8, atol=0)
    torch.testing.assert_close(plan.value[0], -p.detach(), rtol=1e-8, atol=0)
    (right,) = torch.autograd.grad(-k, a)
    (got,) = torch.autograd.grad(plan.actions[0, 0, 0], a, retain_graph=True)
    torch.testing.assert_close(got, right, rtol=1e-6, atol=0)
    # The states do not explode, nor does their derivative.
    assert float(plan.states.detach().abs().max()) <= 1.0
    (of_states,) = torch.autograd.grad(plan.states.square().sum(), a)
    assert abs(float(of_states)) < 10


def test_value_of_the_reported_case():
    assert float(scalar_plan(torch.tensor(1.5, dtype=F64), 200).value) == pytest.approx(-2.63, abs=1e-2)


def gradients(case, solution):
    weights = torch.linspace(-1, 1, solution.x.numel(), dtype=F64).reshape(solution.x.shape)
    return torch.autograd.grad((solution.x * weights).sum(), case.leaves, retain_graph=True)


@pytest.mark.parametrize("name", SOLVERS)
def test_structured_gradient_is_the_dense_one(name):
    case = swing()
    options = dict(solver=SOLVERS[name], box=case.box, max_steps=200, tolerance=1e-12)
    found = {
        linear: solve(case.objective, case.x0, adjoint=Implicit(linear=linear, products=products), **options)
        for linear, products in (("dense", None), ("riccati", None), ("cg", 60), ("auto", None))
    }
    x = found["dense"].x.detach()
    held = (x.abs() == 1.0).sum()
    assert 0 < int(held) < x.numel(), "some bounds should be active, and some not"
    wanted = gradients(case, found["dense"])
    for solution in found.values():
        assert solution.gradient_valid.all()
        torch.testing.assert_close(solution.x.detach(), x)
        for a, b in zip(gradients(case, solution), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("linear", ["dense", "riccati"])
def test_gradient_of_linear_quadratic_control_with_every_leaf(linear):
    objective, leaves = lqr()
    exact = objective.riccati()
    solution = solve(objective, torch.zeros_like(exact), solver=ILQR(), adjoint=Implicit(linear=linear))
    weights = torch.linspace(-1, 1, exact.numel(), dtype=F64).reshape(exact.shape)
    for a, b in zip(
        torch.autograd.grad((solution.x * weights).sum(), leaves),
        torch.autograd.grad((exact * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# The step as an argument.

REFERENCE = torch.sin(torch.arange(20, dtype=F64) / 2)
LIMIT = torch.linspace(0.9, 0.5, 20, dtype=F64)


def tracking(state, init, first_step=0, reference=REFERENCE, constrained=True, **settings):
    return difftori.plan(
        lambda s, u, t: s + (0.5 + 0.1 * (t % 3)) * u,
        lambda s, u, t: -(s[..., 0] - reference[t]).square() - 0.01 * u.square().sum(-1),
        None,
        state,
        init,
        constraint=(lambda s, u, t: s - LIMIT[t]) if constrained else None,
        first_step=first_step,
        **settings,
    )


def augmented_tracking(state, init):
    """The same with the step as a second state."""

    def next_state(s, u):
        x, t = s.split(1, -1)
        return torch.cat([x + (0.5 + 0.1 * torch.remainder(t.detach(), 3)) * u, t + 1], -1)

    def at(table, s):
        t = s[..., 1]
        return (table * (t[..., None] == torch.arange(20, dtype=F64))).sum(-1)

    return difftori.plan(
        next_state,
        lambda s, u: -(s[..., 0] - at(REFERENCE, s)).square() - 0.01 * u.square().sum(-1),
        None,
        torch.cat([state, torch.zeros_like(state)], -1),
        init,
        constraint=lambda s, u: s[..., :1] - at(LIMIT, s)[..., None],
    )


def test_step_argument_equals_a_clock_in_the_state():
    state, init = torch.tensor([[0.0], [0.4]], dtype=F64), torch.zeros(2, 10, 1, dtype=F64)
    plan, clocked = tracking(state, init), augmented_tracking(state, init)
    assert plan.solution.converged.all()
    torch.testing.assert_close(plan.actions, clocked.actions, rtol=0, atol=1e-5)
    torch.testing.assert_close(plan.states, clocked.states[..., :1], rtol=0, atol=1e-5)
    assert float((plan.states[:, :-1, 0] - LIMIT[:10]).max()) <= 1e-6
    assert float((plan.states[:, :-1, 0] - LIMIT[:10]).max()) >= -1e-5, "the constraint should be active"


@pytest.mark.parametrize("solver", SOLVERS)
def test_first_step_shifts_the_clock(solver):
    state, init = torch.tensor([[0.2]], dtype=F64), torch.zeros(1, 6, 1, dtype=F64)
    later = difftori.plan(
        lambda s, u, t: s + (0.5 + 0.1 * ((t + 4) % 3)) * u,
        lambda s, u, t: -(s[..., 0] - REFERENCE[t + 4]).square() - 0.01 * u.square().sum(-1),
        None,
        state,
        init,
        constraint=lambda s, u, t: s - LIMIT[t + 4],
        solver=SOLVERS[solver],
    )
    shifted = tracking(state, init, first_step=4, solver=SOLVERS[solver])
    torch.testing.assert_close(shifted.actions, later.actions)
    assert (shifted.actions - tracking(state, init, solver=SOLVERS[solver]).actions).abs().max() > 1e-2


def test_gradient_reaches_the_reference():
    reference = REFERENCE.clone().requires_grad_()
    state, init = torch.zeros(1, 8, dtype=F64)[:, :1], torch.zeros(1, 8, 1, dtype=F64)

    def loss(reference):
        plan = tracking(state, init, 2, reference, constrained=False, tolerance=1e-12)
        return plan.actions[0, 0, 0] + plan.states[0, 5, 0]

    (got,) = torch.autograd.grad(loss(reference), reference)
    for i in (2, 4, 7):
        step = 1e-5 * torch.eye(20, dtype=F64)[i]
        with torch.no_grad():
            wanted = (loss(reference + step) - loss(reference - step)) / 2e-5
        torch.testing.assert_close(got[i], wanted, rtol=1e-5, atol=1e-8)
    assert (got[:2] == 0).all()
    assert (got[11:] == 0).all()


def test_a_third_argument_with_a_default_is_not_the_step():
    state, init = torch.tensor([[0.5]], dtype=F64), torch.zeros(1, 5, 1, dtype=F64)

    def solved(dynamics):
        reward = lambda s, u: -s.square().sum(-1) - 0.1 * u.square().sum(-1)  # noqa: E731
        return difftori.plan(dynamics, reward, None, state, init).actions

    def with_period(s, u, dt=0.1):
        return s + dt * u

    def with_default_step(s, u, t=0):
        return s + 0.1 * (t + 1) * u

    torch.testing.assert_close(solved(with_period), solved(lambda s, u: s + 0.1 * u))
    torch.testing.assert_close(solved(with_default_step), solved(lambda s, u, t: s + 0.1 * (t + 1) * u))

    class Model(torch.nn.Module):
        def forward(self, s, u, dt=0.1):
            return s + dt * u

    assert not torch.allclose(solved(with_default_step), solved(with_period))
    torch.testing.assert_close(solved(Model()), solved(with_period))


# States.


def damped_pendulum(gravity):
    def next_state(s, u):
        angle, speed = s.split(1, -1)
        speed = speed + 0.1 * (-gravity * angle.sin() - 0.5 * speed + 2 * u)
        return torch.cat([angle + 0.1 * speed, speed], -1)

    return next_state


@pytest.mark.parametrize("name", SOLVERS)
def test_states_are_where_the_actions_lead(name):
    gravity = torch.tensor(3.0, dtype=F64, requires_grad=True)
    state = torch.tensor([[0.5, 0.0], [-1.5, 0.3]], dtype=F64, requires_grad=True)

    def solved(gravity, state):
        return difftori.plan(
            damped_pendulum(gravity),
            lambda s, u: -(s[..., 0] - 0.8).square() - 0.1 * s[..., 1].square() - 0.02 * u.square().sum(-1),
            None,
            state,
            torch.zeros(2, 10, 1, dtype=F64),
            solver=SOLVERS[name],
            tolerance=1e-12,
        )

    plan = solved(gravity, state)
    assert (plan.actions.abs() == 1).any()
    rolled, step = [state], damped_pendulum(gravity)
    for t in range(10):
        rolled.append(step(rolled[-1], plan.actions[:, t]))
    rolled = torch.stack(rolled, 1)
    torch.testing.assert_close(plan.states, rolled)
    weights = torch.randn(plan.states.shape, dtype=F64)
    got = torch.autograd.grad((plan.states * weights).sum(), [gravity, state], retain_graph=True)
    through = torch.autograd.grad((rolled * weights).sum(), [gravity, state])
    for a, b in zip(got, through, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        up, down = (solved(gravity + e, state).states for e in (1e-5, -1e-5))
        torch.testing.assert_close(got[0], ((up - down) * weights).sum() / 2e-5, rtol=1e-4, atol=1e-7)
        move = 1e-5 * torch.eye(2, dtype=F64)[0]
        up, down = (solved(gravity, state + e).states for e in (move, -move))
        torch.testing.assert_close(got[1][:, 0], ((up - down) * weights).sum((1, 2)) / 2e-5, rtol=1e-4, atol=1e-7)


# The cart-pole of the control benchmark (shared/cases/casadi_cartpole.py): CasADi with IPOPT finds 47.01.


def cart_pole(mass, length):
    def derivative(s, u):
        _, angle, speed, turn = s.unbind(-1)
        sin, cos, total = angle.sin(), angle.cos(), 1 + mass
        q = (u[..., 0] + mass * length * turn * turn * sin) / total
        a = (9.81 * sin - cos * q) / (length * (4 / 3 - mass * cos * cos / total))
        return torch.stack([speed, turn, q - mass * length * a * cos / total, a], -1)

    def next_state(s, u, dt=0.05):
        k1 = derivative(s, u)
        k2 = derivative(s + dt / 2 * k1, u)
        k3 = derivative(s + dt / 2 * k2, u)
        k4 = derivative(s + dt * k3, u)
        return s + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return next_state


def swing_up(mass, length, state, init, **settings):
    scale = torch.tensor([0.1, 0.0, 0.01, 0.01], dtype=state.dtype)
    last = torch.tensor([10.0, 0.0, 10.0, 10.0], dtype=state.dtype)
    return difftori.plan(
        cart_pole(mass, length),
        lambda s, u: -((scale * s.square()).sum(-1) + 1 - s[..., 1].cos() + 0.001 * u[..., 0].square()),
        lambda s: -((last * s.square()).sum(-1) + 100 * (1 - s[..., 1].cos())),
        state,
        init,
        -10.0,
        10.0,
        **settings,
    )


def hanging(dtype):
    return torch.tensor([[0.0, math.pi, 0.0, 0.0]], dtype=dtype), torch.full((1, 50, 1), 0.01, dtype=dtype)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_cart_pole_swing_up(dtype):
    mass, length = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (0.1, 0.5))
    plan = swing_up(mass, length, *hanging(dtype))
    assert -float(plan.value) <= 47.1
    assert float(plan.actions.detach().abs().max()) <= 10.0
    if dtype == torch.float32:
        return
    assert plan.solution.converged.all()
    assert plan.solution.gradient_valid.all()
    # A start elsewhere might end in another optimum, so differences are taken of solves from this one.
    weights = torch.linspace(-1, 1, 50, dtype=dtype)
    got = torch.autograd.grad((plan.actions[0, :, 0] * weights).sum(), [mass, length])
    state, init = hanging(dtype)[0], plan.actions.detach()
    eps = 1e-5
    with torch.no_grad():
        for i, value in enumerate(got):
            dm, dl = (eps, 0.0) if i == 0 else (0.0, eps)
            up, down = (
                (
                    swing_up(mass + s * dm, length + s * dl, state, init, tolerance=1e-11).actions[0, :, 0] * weights
                ).sum()
                for s in (1, -1)
            )
            torch.testing.assert_close(value, (up - down) / (2 * eps), rtol=1e-4, atol=1e-6)


def test_a_start_near_the_top_is_balanced_not_swung_around():
    with torch.no_grad():
        state = torch.tensor([[0.3, 0.3, 0.0, 0.0]], dtype=F64)
        plan = swing_up(0.1, 0.5, state, hanging(F64)[1])
    assert -float(plan.value) < 5.0
    assert float(plan.states[..., 1].abs().max()) < 1.0
    assert float(plan.states[:, -1].abs().max()) < 0.1


# Which linear solver.


def test_automatic_choice_of_the_linear_solver():
    def chosen(horizon, size, carried):
        state = torch.zeros(1, size, dtype=F64)
        objective = trajectory_objective(lambda s, u: s + u, lambda s, u: -u.square().sum(-1), None, state, horizon, 1)
        return Implicit().method(
            Problem(objective, Box(), False, None, None, False), torch.zeros(1, horizon, dtype=F64), carried
        )

    def plain(n):
        objective = FunctionObjective(lambda x: x.square().sum(-1))
        return Implicit().method(
            Problem(objective, Box(), False, None, None, False), torch.zeros(1, n, dtype=F64), False
        )

    assert chosen(5, 2, True) == "riccati"
    assert chosen(5, 2, False) == "dense"
    assert chosen(8, 2, False) == "dense"
    assert chosen(9, 2, False) == "riccati"
    assert chosen(60, 40, False) == "cg"
    assert chosen(60, 40, True) == "riccati"
    assert plain(48) == "dense"
    assert plain(49) == "cg"


def test_a_gradient_that_products_did_not_reach_is_flagged():
    """Curvatures of 1 to 1e6 need more products than one; the second row has one curvature only, which one product solves."""
    curvature = torch.stack([torch.logspace(0, 6, 8, dtype=F64), torch.ones(8, dtype=F64)])
    target = torch.full((2, 8), 0.5, dtype=F64, requires_grad=True)

    def solved(products):
        return solve(
            lambda x: 0.5 * (curvature * (x - target).square()).sum(-1),
            target.detach(),
            adjoint=Implicit(linear="cg", products=products),
            max_steps=5,
        )

    poor = solved(1)
    assert poor.gradient_valid.all(), "nothing has been asked yet"
    weights = torch.linspace(-1, 2, 8, dtype=F64)
    (poor.x * weights).sum().backward()
    assert poor.gradient_valid.tolist() == [False, True]
    target.grad = None
    enough = solved(60)
    (enough.x * weights).sum().backward()
    assert enough.gradient_valid.all()
    torch.testing.assert_close(target.grad, weights.expand(2, 8), rtol=1e-6, atol=1e-6)


def test_without_second_order_and_hold_the_optimum_is_the_same():
    case = swing()
    whole = solve(case.objective, case.x0, solver=ILQR(), box=case.box, max_steps=300)
    plain = solve(
        case.objective, case.x0, solver=replace(ILQR(), second_order=False, hold=False), box=case.box, max_steps=300
    )
    torch.testing.assert_close(plain.x.detach(), whole.x.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", [ILQR(), ProjectedGradient(polish=2), Newton()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("constrained", [False, True])
def test_layer_normalisation_in_models(solver, constrained):
    """Its second derivatives are added in place by torch, which vmap allows in some layouts only. The gradient is that of differences."""
    torch.manual_seed(3)

    def net(inputs, outputs):
        layers = nn.Linear(inputs, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, outputs)
        return nn.Sequential(*layers).double().requires_grad_(False)

    change, reward, state = net(3, 2), net(3, 1), torch.randn(3, 2, dtype=torch.float64)

    def found(scale):
        return difftori.plan(
            lambda s, a: s + scale * change(torch.cat([s, a], -1)),
            lambda s, a: 0.1 * reward(torch.cat([s, a], -1)).squeeze(-1) - a.square().sum(-1),
            lambda s: -s.square().sum(-1),
            state,
            torch.zeros(3, 4, 1, dtype=torch.float64),
            solver=solver,
            constraint=(lambda s, a: s - 10.0 + 0.1 * change(torch.cat([s, a], -1))) if constrained else None,
        ).actions.sum()

    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(found(scale), scale)
    with torch.no_grad():
        step = 1e-4
        differences = (found(scale + step) - found(scale - step)) / (2 * step)
    torch.testing.assert_close(gradient, differences, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ilqr_uses_exact_curvature_where_bounds_hold_actions_of_negative_curvature(dtype):
    """The curvature of an action on its bound does not matter. Counted as no minimum, it left linear convergence: 200 steps and more."""
    solution = difftori.plan(
        lambda s, a: s + 0.2 * torch.sin(2 * a),
        lambda s, a: -s[:, 0].square() - 0.2 * torch.cos(2.5 * a[:, 0]),
        lambda s: -5 * s[:, 0].square(),
        torch.tensor([[1.0], [-0.7], [2.0]], dtype=dtype),
        torch.full((3, 12, 1), 0.3, dtype=dtype),
    ).solution
    assert solution.converged.all(), (solution.status, solution.steps)
    assert int(solution.steps.max()) <= 25
    assert solution.gradient_valid.all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ilqr_with_a_product_of_two_bounded_actions(dtype):
    """Thrust and gimbal: their product makes the curvature of both indefinite, wherever the thrust is on its bound."""

    def dynamics(s, a):
        thrust, gimbal = (a * torch.tensor([1e4, 0.1], dtype=dtype)).unbind(-1)
        _, _, tilt, vx, vy, turn = s.unbind(-1)
        ax, ay = thrust / 1e3 * torch.sin(tilt + gimbal), thrust / 1e3 * torch.cos(tilt + gimbal) - 9.81
        return s + 0.1 * torch.stack([vx, vy, turn, ax, ay, -thrust * torch.sin(gimbal) / 1e3], -1)

    weights = torch.tensor([0.1, 0.1, 5.0, 0.1, 0.1, 0.0], dtype=dtype)
    last = torch.tensor([10.0, 10.0, 100.0, 10.0, 10.0, 10.0], dtype=dtype)
    solution = difftori.plan(
        dynamics,
        lambda s, a: (
            -(weights * s.square()).sum(-1) - 0.1 * (a - torch.tensor([0.981, 0.0], dtype=dtype)).square().sum(-1)
        ),
        lambda s: -(last * s.square()).sum(-1),
        torch.tensor([[5.0, 20.0, 0.1, 0.0, -3.0, 0.0], [-8.0, 10.0, -0.2, 1.0, -1.0, 0.1]], dtype=dtype),
        torch.tensor([0.981, 0.0], dtype=dtype).expand(2, 20, 2),
        torch.tensor([0.0, -2.0], dtype=dtype),
        2.0,
    ).solution
    assert solution.converged.all(), (solution.status, solution.steps)
    assert solution.gradient_valid.all()
