"""Faults that a control engineer met in ordinary problems: each was a wrong status or a wrong gradient."""

import math
from functools import partial

import pytest
import torch

import difftori
from difftori import Controller
from difftori.errors import ObjectiveError, ShapeError, SolverError
from difftori.solver import ILQR, AugmentedLagrangian, Detached, Implicit, Newton, ProjectedGradient, Status, solve

F32, F64 = torch.float32, torch.float64


def moved(state, action, mass=1.0):
    """A point mass: position and speed."""
    speed = state[..., 1] + 0.1 * action[..., 0] / mass
    return torch.stack((state[..., 0] + 0.1 * speed, speed), -1)


def reach(state, action):
    return -(state[..., 0] - 1).square() - 0.05 * action[..., 0].square()


# Values for each row in closures.


@pytest.mark.parametrize("solver", [None, ProjectedGradient(window=5, polish=1), Newton()])
@pytest.mark.parametrize("bad", [[1], [0], [0, 2], [0, 1, 2]])
def test_a_nan_row_beside_parameters_of_each_row(solver, bad):
    """Rows cannot be cut out of a tensor that the functions close over."""
    mass = torch.tensor([1.0, 1.5, 2.0], dtype=F64, requires_grad=True)
    shared = torch.tensor(1.0, dtype=F64, requires_grad=True)

    def plan(state):
        return difftori.plan(
            lambda s, a: moved(s, a, mass * shared),
            reach,
            None,
            state,
            torch.zeros(3, 5, 1, dtype=F64),
            solver=solver,
        )

    good = [row for row in range(3) if row not in bad]
    state = torch.zeros(3, 2, dtype=F64)
    whole = plan(state)
    expected = torch.autograd.grad(whole.actions[good, 0].sum(), (mass, shared)) if good else ()
    state[bad] = torch.nan
    found = plan(state)
    if not good:
        assert not found.actions.requires_grad
        return
    assert found.solution.gradient_valid.tolist() == [row in good for row in range(3)]
    grads = torch.autograd.grad(found.actions[good, 0].sum(), (mass, shared), materialize_grads=True)
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


# Large units.


def truck(dtype, unit):
    """40 t, force in units of `unit` newtons up to 1e5 N, at most 14 m/s."""

    def dynamics(s, a):
        speed = s[..., 1] + 0.5 * (a[..., 0] * unit - 300 * s[..., 1]) / 4e4
        return torch.stack((s[..., 0] + 0.5 * speed, speed), -1)

    def reward(s, a):
        return -1e-2 * (s[..., 0] - 100).square() - 1e-11 * (a[..., 0] * unit).square()

    return difftori.plan(
        dynamics,
        reward,
        None,
        torch.zeros(1, 2, dtype=dtype),
        torch.zeros(1, 20, 1, dtype=dtype),
        -1e5 / unit,
        1e5 / unit,
        constraint=lambda s, a: s[..., 1:] - 14,
        adjoint=Detached(),
    )


@pytest.mark.parametrize("dtype", [F32, F64])
def test_one_actuator_in_newtons_is_planned_as_in_units_of_its_range(dtype):
    newtons, scaled = truck(dtype, 1.0), truck(dtype, 1e5)
    assert newtons.solution.status.tolist() == scaled.solution.status.tolist() == [Status.CONVERGED]
    assert abs(int(newtons.solution.steps) - int(scaled.solution.steps)) <= 2
    torch.testing.assert_close(newtons.actions / 1e5, scaled.actions, rtol=0, atol=2e-3 if dtype == F32 else 1e-5)


# What the status says of a Hessian.


def test_an_action_without_effect_is_ill_conditioned_and_no_saddle():
    """The last action moves the speed only, which no reward sees."""
    start = torch.zeros(1, 2, dtype=F64), torch.zeros(1, 6, 1, dtype=F64)
    weight = torch.ones((), dtype=F64, requires_grad=True)
    for adjoint in (None, Implicit(linear="dense")):
        found = difftori.plan(moved, lambda s, a: -weight * (s[..., 0] - 1).square(), None, *start, adjoint=adjoint)
        assert found.solution.status.tolist() == [Status.ILL_CONDITIONED]
        assert found.solution.gradient_valid.tolist() == [False]


def test_redundant_actuators_without_a_cost_have_no_trusted_gradient():
    target = torch.tensor(3.0, dtype=F64, requires_grad=True)
    found = difftori.plan(
        lambda s, a: s + 0.1 * a.sum(-1, keepdim=True),
        lambda s, a: -(s[..., 0] - 0.1 * target).square(),
        lambda s: -(s[..., 0] - 0.1 * target).square(),
        torch.zeros(1, 1, dtype=F64),
        torch.zeros(1, 4, 2, dtype=F64),
        -5.0,
        5.0,
    )
    assert found.solution.status.tolist() == [Status.ILL_CONDITIONED]
    assert found.solution.gradient_valid.tolist() == [False]


@pytest.mark.parametrize(("cost", "status"), [(0.05, Status.CONVERGED), (0.005, Status.ILL_CONDITIONED)])
def test_float32_has_the_gradient_of_float64_with_a_shared_power_limit_or_says_that_it_has_not(cost, status):
    def gradient(dtype):
        limit, mass = (torch.tensor(value, dtype=dtype, requires_grad=True) for value in (1.2, 1.5))

        def dynamics(s, a):
            x, vx, y, vy = s.unbind(-1)
            vx, vy = vx + 0.2 * a[..., 0] / mass, vy + 0.2 * a[..., 1] / mass
            return torch.stack((x + 0.2 * vx, vx, y + 0.2 * vy, vy), -1)

        found = difftori.plan(
            dynamics,
            lambda s, a: -(s[..., 0] - 1).square() - (s[..., 2] + 0.5).square() - cost * a.square().sum(-1),
            None,
            torch.zeros(1, 4, dtype=dtype),
            torch.zeros(1, 8, 2, dtype=dtype),
            -3.0,
            3.0,
            constraint=lambda s, a: torch.stack((a[..., 0] - a[..., 1] - limit, a[..., 0] + a[..., 1] - limit), -1),
        )
        weights = torch.linspace(-1, 1, 16, dtype=dtype).view(8, 2)
        return found.solution, torch.stack(torch.autograd.grad((found.actions[0] * weights).sum(), (limit, mass)))

    (_, exact), (solution, found) = gradient(F64), gradient(F32)
    assert (solution.status.tolist(), solution.gradient_valid.tolist()) == ([status], [status == Status.CONVERGED])
    if status == Status.CONVERGED:
        torch.testing.assert_close(found.double(), exact, rtol=5e-3, atol=1e-3)


def test_multipliers_that_have_not_settled_give_no_trusted_gradient():
    def run(limit, **options):
        limit = torch.tensor(limit, dtype=F64, requires_grad=True)
        start = torch.zeros(1, 1, dtype=F64)
        return solve(lambda x: (x - 2).square().sum(-1), start, inequality=lambda x: x - limit, **options)

    tight = run(-5.0)
    stale = run(3.0, multipliers=tight.multipliers, augmented=AugmentedLagrangian(rounds=1))
    assert stale.status.tolist() == [Status.MAX_STEPS]
    assert stale.gradient_valid.tolist() == [False]
    assert run(3.0, multipliers=tight.multipliers).x.item() == pytest.approx(2.0)


def test_multipliers_of_an_infeasible_plan_do_not_spoil_the_next():
    def plan(speed, multipliers=None):
        return difftori.plan(
            moved,
            reach,
            None,
            torch.tensor([[0.0, speed]], dtype=F64),
            torch.zeros(1, 10, 1, dtype=F64),
            -2.0,
            2.0,
            constraint=lambda s, a: s[..., 1:] - 0.5,
            adjoint=Detached(),
            multipliers=multipliers,
        )

    multipliers = None
    for _ in range(4):
        multipliers = plan(3.0, multipliers).solution.multipliers
    torch.testing.assert_close(plan(0.1, multipliers).actions, plan(0.1).actions, rtol=0, atol=1e-3)


# Arguments.


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_transforms_that_would_be_wrong_are_refused():
    def first(target):
        start = torch.zeros(1, 2, dtype=F64), torch.zeros(1, 5, 1, dtype=F64)
        return difftori.plan(moved, lambda s, a: reach(s - target, a), None, *start).actions[0, :, 0]

    target = torch.tensor([0.5, 0.0], dtype=F64)
    for transform in (torch.func.jacrev, torch.func.vmap):
        with pytest.raises(SolverError, match="functional.jacobian"):
            transform(first)(target[None] if transform is torch.func.vmap else target)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(SolverError, match="functional.jacobian"):
        first(torch.autograd.forward_ad.make_dual(target, target))
    assert torch.autograd.functional.jacobian(first, target).abs().max() > 0


@pytest.mark.parametrize("reward", [lambda s, a: s[..., 0] > 0, lambda s, a: s[..., 0].double()])
def test_a_reward_of_another_type_is_named(reward):
    with pytest.raises(ObjectiveError, match=r"reward returned torch\.(bool|float64) for a state in torch\.float32"):
        difftori.plan(moved, reward, None, torch.zeros(2, 2), torch.zeros(2, 5, 1))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"dynamics": lambda s, a: moved(s / (1 + s.norm()), a)}, "dynamics"),
        ({"reward": lambda s, a: reach(s, a) / s.std()}, "reward"),
        ({"terminal_value": lambda s: -(s - s.mean(0)).square().sum(-1)}, "terminal_value"),
        ({"constraint": lambda s, a: s - s.mean() - 9.0}, "constraint"),
        ({"terminal_constraint": lambda s: s - s.mean(0) - 9.0}, "terminal_constraint"),
    ],
)
@pytest.mark.parametrize("closed_loop", [False, True])
def test_functions_that_mix_rows_are_named(changed, name, closed_loop):
    model = {"dynamics": moved, "reward": reach, "terminal_value": None} | changed
    state = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    if closed_loop:
        call = partial(Controller(**model, horizon=5, action_dim=1), state)
    else:
        call = partial(difftori.plan, **model, state=state, init_actions=torch.zeros(2, 5, 1))
    with pytest.raises(ObjectiveError, match=f"^{name}: the value of row 1 depends on row 0"):
        call()


@pytest.mark.parametrize("discount", [-0.5, math.nan, math.inf, 0.0])
def test_discounts_are_checked(discount):
    def edge(s):
        return s[..., :1] - 5.0

    with pytest.raises(ObjectiveError, match=f"discount={discount} must be"):
        difftori.plan(
            moved, reach, None, torch.zeros(2, 2), torch.zeros(2, 5, 1), discount=discount, terminal_constraint=edge
        )
    if discount == 0:  # the next reward only
        difftori.plan(moved, reach, None, torch.zeros(2, 2), torch.zeros(2, 5, 1), discount=discount)


@pytest.mark.parametrize(
    "value",
    [lambda s: -s.square().sum(), lambda s: -s[..., :1].square(), lambda s: 0.0],
    ids=["sum", "column", "number"],
)
@pytest.mark.usefixtures("unchecked")
def test_a_terminal_value_has_one_number_for_each_row(value):
    with pytest.raises(ObjectiveError, match="terminal_value returned"):
        difftori.plan(moved, reach, value, torch.zeros(2, 2), torch.zeros(2, 5, 1))


@pytest.mark.parametrize(
    ("state", "actions", "words"),
    [
        (torch.zeros(2), torch.zeros(2, 5, 1), "state has shape"),
        (torch.zeros(2, 2).numpy(), torch.zeros(2, 5, 1), "state has type ndarray"),
        (torch.zeros(2, 2), torch.zeros(2, 0, 1), "init_actions has shape"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_states_and_guesses_of_a_plan_are_checked(state, actions, words):
    with pytest.raises(ShapeError, match=words):
        difftori.plan(moved, reach, None, state, actions)


def test_an_empty_batch_with_constraints_is_empty():
    found = difftori.plan(
        moved, reach, None, torch.zeros(0, 2), torch.zeros(0, 5, 1), constraint=lambda s, a: s[..., 1:] - 1
    )
    assert found.actions.shape == (0, 5, 1)


def test_constraints_keep_the_promises_of_a_solve():
    start, limit = torch.zeros(2, 2, dtype=F64), torch.tensor(0.3, dtype=F64, requires_grad=True)

    def cost(x):
        return (x - 1).square().sum(-1)

    def limited(x):
        return x.sum(-1, keepdim=True) - limit

    with pytest.raises(SolverError, match="history"):
        solve(cost, start, inequality=limited, history=True)
    with pytest.raises(ObjectiveError, match="m ≥ 1"):
        solve(cost, start, inequality=lambda x: x[:, :0])
    with pytest.raises(SolverError, match="tolerance=0.0 is invalid"):
        AugmentedLagrangian(tolerance=0.0)
    start[1] = torch.nan
    found = solve(cost, start, inequality=limited)
    assert found.status.tolist() == [Status.CONVERGED, Status.NON_FINITE]
    assert found.gradient_valid.tolist() == [True, False]


def test_a_gradient_that_is_zero_up_to_rounding_agrees():
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)

    def cost(x):
        return (
            scale * ((x - 0.7).square() + 0.1 * (x - 0.7) ** 4).sum(-1) + 0.3 * scale * (x[:, 0] - x[:, 1] / 2).square()
        )

    assert difftori.solver.check_gradients(cost, torch.zeros(2, 2, dtype=F64)).ok


@pytest.mark.parametrize("weight", [0.1, 0.01])
def test_a_light_weight_of_the_multipliers_does_not_change_the_derivative(weight):
    """One step to a limit: the action follows the limit, with derivative 1."""
    limit = torch.tensor(0.5, dtype=F64, requires_grad=True)
    found = difftori.plan(
        lambda s, a: s + a,
        lambda s, a: -(a[..., 0] - limit.detach() - 0.005).square(),
        None,
        torch.zeros(1, 1, dtype=F64),
        torch.zeros(1, 1, 1, dtype=F64),
        terminal_constraint=lambda s: s - limit,
        augmented=AugmentedLagrangian(weight=weight, tolerance=0.01),
    )
    assert found.solution.gradient_valid.tolist() == [True]
    (slope,) = torch.autograd.grad(found.actions.sum(), limit)
    assert slope.item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("bound", [1e4, 1e6])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_loose_bound_changes_neither_the_plan_nor_the_number_of_steps(bound, dtype):
    def unicycle(s, a):
        x, y, heading = s.unbind(-1)
        turned = heading + 0.1 * a[..., 1]
        step = 0.1 * a[..., 0]
        return torch.stack((x + step * turned.cos(), y + step * turned.sin(), turned), -1)

    def plan(bound):
        return difftori.plan(
            unicycle,
            lambda s, a: -(s[..., 0] - 1).square() - (s[..., 1] - 1).square() - 0.01 * a.square().sum(-1),
            None,
            torch.zeros(1, 3, dtype=dtype),
            0.1 * torch.ones(1, 10, 2, dtype=dtype),
            -bound,
            bound,
            adjoint=Detached(),
        )

    free, loose = plan(torch.inf), plan(bound)
    assert loose.solution.status.tolist() == [Status.CONVERGED]
    assert abs(int(loose.solution.steps) - int(free.solution.steps)) <= 1
    torch.testing.assert_close(loose.actions, free.actions, rtol=1e-2, atol=1e-3)


def test_a_chain_of_warm_starts_survives_a_tiny_first_weight():
    """The first solve starts at the optimum without the constraint, where the weight is tiny; then the target moves."""

    def run(target, x, multipliers=None):
        def cost(x):
            return (x - target).square().sum(-1)

        return solve(cost, x, inequality=lambda x: x - 1, multipliers=multipliers, adjoint=Detached())

    found = run(0.0, torch.full((1, 1), 1e-9, dtype=F64))
    for target in (0.0, 4.0, 4.0):
        found = run(target, found.x, found.multipliers)
    assert found.status.tolist() == [Status.CONVERGED]
    assert found.x.item() == pytest.approx(1.0, abs=1e-5)


def drifting(speed, drag, solver=None, terminal=False, wind=0.0):
    """A body in the plane with quadratic drag, whose second derivative PyTorch returns as NaN at rest, drawn to a place."""

    def moved(state, action):
        speed, through = state[..., 2:], state[..., 2:] - wind
        pull = drag * through * through.norm(dim=-1, keepdim=True)
        return torch.cat([state[..., :2] + 0.1 * speed, speed + 0.1 * (action - pull)], -1)

    def reward(state, action):
        return -(state[..., :2] - 1).square().sum(-1) - 0.1 * action.square().sum(-1)

    start = torch.tensor([[0.0, 0.0, speed, 0.0], [1.0, 1.0, 0.0, speed]], dtype=F64)
    rest = (lambda state: -state[..., 2:].norm(dim=-1).pow(3)) if terminal else None
    return difftori.plan(moved, reward, rest, start, torch.zeros(2, 5, 2, dtype=F64), solver=solver)


DRIFT = {
    "exact": (ILQR(), 4),
    "first order": (ILQR(second_order=False), 12),
    "newton": (Newton(), 4),
    "gradient": (ProjectedGradient(window=5, polish=1), 12),
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", DRIFT)
def test_a_norm_at_zero_has_a_derivative(name, terminal):
    """It took 200 steps, and the gradient was 0 or NaN. The second row stays at rest at its optimum."""
    drag = torch.tensor(0.2, dtype=F64, requires_grad=True)
    solver, most = DRIFT[name]
    plan = drifting(0.0, drag, solver, terminal)
    assert plan.solution.converged.all()
    assert plan.solution.gradient_valid.all()
    assert plan.solution.steps.max() <= most
    assert plan.actions[1].abs().max() < 1e-8
    (grad,) = torch.autograd.grad(plan.actions[:, 1].sum(), drag)
    (nearby,) = torch.autograd.grad(drifting(1e-6, drag, None, terminal).actions[:, 1].sum(), drag)
    torch.testing.assert_close(grad, nearby, rtol=1e-4, atol=1e-9)
    more, less = (drifting(0.0, drag.detach() + sign * 1e-4, None, terminal).actions[:, 1].sum() for sign in (1, -1))
    torch.testing.assert_close(grad, (more - less) / 2e-4, rtol=1e-4, atol=1e-7)


def filled(state, action):
    following = torch.zeros(state.shape, dtype=state.dtype)
    following[:, 0], following[:, 1] = moved(state, action).unbind(-1)
    return following


def branching(state, action):
    return moved(state, action) if state[0, 0] > 0 else moved(state, -action)


@pytest.mark.parametrize("model", [filled, branching])
def test_models_that_cannot_be_batched_are_named(model):
    with pytest.raises(ObjectiveError, match=r"several points at once.*Fix: .*torch\.stack.*torch\.where"):
        difftori.plan(model, reach, None, torch.ones(1, 2, dtype=F64), torch.zeros(1, 5, 1, dtype=F64))


def test_terminal_functions_take_the_step():
    """The last state follows a reference of its own step, in `plan` and in a controller."""
    reference = torch.linspace(0.0, 3.0, 31, dtype=F64)
    steps = []

    def late(state, t):
        steps.append(int(t))
        return -10 * (state[..., 0] - reference[t]).square()

    def cheap(state, action):
        return -1e-6 * action[..., 0].square()

    def fast(state, t):
        return state[..., 1:] - torch.where(t < 9, 10.0, 0.5)

    def ends(first_step, **settings):
        start, guess = torch.zeros(1, 2, dtype=F64), torch.zeros(1, 5, 1, dtype=F64)
        return difftori.plan(moved, cheap, late, start, guess, -99.0, 99.0, first_step=first_step, **settings).states

    assert ends(0)[0, -1, 0].item() == pytest.approx(reference[5].item(), abs=1e-3)
    assert set(steps) == {5}
    assert ends(4)[0, -1, 0].item() == pytest.approx(reference[9].item(), abs=1e-3)
    assert ends(3, terminal_constraint=fast)[0, -1, 1] > 0.6
    assert ends(4, terminal_constraint=fast)[0, -1, 1].item() == pytest.approx(0.5, abs=1e-5)
    controller = difftori.Controller(moved, cheap, late, horizon=5, action_dim=1, low=-99.0, high=99.0)
    for call in range(3):
        steps.clear()
        controller(torch.zeros(1, 2, dtype=F64))
        assert set(steps) == {call + 5}


@pytest.mark.parametrize("name", DRIFT)
def test_a_parameter_inside_a_norm_at_zero(name):
    """The mixed derivative is NaN there too; the derivative of the optimum was NaN and called valid."""
    wind, solver = torch.zeros(2, dtype=F64, requires_grad=True), DRIFT[name][0]
    plan = drifting(0.0, torch.tensor(0.2, dtype=F64), solver, wind=wind)
    assert plan.solution.gradient_valid.all()
    (grad,) = torch.autograd.grad(plan.actions[0, 1].sum(), wind)
    change = torch.tensor([1e-4, 0.0], dtype=F64)
    more, less = (
        drifting(0.0, torch.tensor(0.2, dtype=F64), None, wind=sign * change).actions[0, 1].sum() for sign in (1, -1)
    )
    assert grad[0].item() == pytest.approx(((more - less) / 2e-4).item(), rel=1e-2)
