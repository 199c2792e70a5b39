"""The controller in closed loop: warm starts, disturbances, failures and its door's checks."""

import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch

from difftori import Controller
from difftori.errors import NonFiniteError, ShapeError, SolverError
from difftori.solver import ILQR, ProjectedGradient, Status

F64 = torch.float64
DT = 0.05


def pendulum(state, action):
    """Angle 0 is upright."""
    angle, speed = state.unbind(-1)
    speed = speed + DT * (9.81 * torch.sin(angle) + action[..., 0])
    return torch.stack([angle + DT * speed, speed], -1)


def upright(state, action):
    return -(2 * (1 - state[..., 0].cos()) + 0.05 * state[..., 1].square() + 0.001 * action[..., 0].square())


def balancer(**settings):
    options = dict(horizon=20, action_dim=1, low=-5.0, high=5.0)
    return Controller(
        pendulum, upright, lambda s: 10 * upright(s, torch.zeros_like(s[..., :1])), **(options | settings)
    )


def integrator(state, action):
    return state + 0.5 * action


def rest(state, action):
    return -(state.square().sum(-1) + 0.1 * action.square().sum(-1))


def simple(**settings):
    options = dict(horizon=6, action_dim=2)
    return Controller(integrator, rest, **(options | settings))


def run(controller, state, steps, model=pendulum, disturbance=0.0):
    generator = torch.Generator().manual_seed(0)
    path = [state]
    for _ in range(steps):
        action = controller(path[-1])
        noise = torch.randn(state.shape, generator=generator, dtype=state.dtype)
        path.append(model(path[-1], action) + disturbance * noise)
    return torch.stack(path)


def test_a_disturbed_pendulum_is_held():
    controller = balancer()
    path = run(controller, torch.tensor([[0.3, 0.0], [-0.2, 0.5]], dtype=F64), 30, disturbance=0.01)
    assert float(path[-10:, :, 0].abs().max()) < 0.15
    timing = controller.timing()
    assert timing.calls == 30
    assert timing.fallbacks == 0
    assert 0 < timing.median_ms <= timing.p95_ms <= timing.longest_ms


def test_a_hanging_pendulum_is_swung_up():
    """Torque 5 does not lift the pendulum, which weighs 9.81, at once."""
    controller = balancer(horizon=30, init_actions=0.1)
    path = run(controller, torch.tensor([[math.pi, 0.0]], dtype=F64), 55)
    assert float(1 - path[-3:, 0, 0].cos().min()) < 0.05


def test_warm_calls_take_fewer_steps():
    controller = balancer()
    state = torch.tensor([[0.4, 0.0]], dtype=F64)
    action = controller(state)
    first = int(controller.plan.solution.steps.max())
    for _ in range(5):
        state = pendulum(state, action)
        action = controller(state)
        assert int(controller.plan.solution.steps.max()) < first
    # No disturbance: the moved plan is nearly right already.
    assert int(controller.plan.solution.steps.max()) <= 3
    assert controller.timing().median_steps < first


def test_a_warm_answer_is_the_cold_one():
    controller, state = balancer(max_steps=50, tolerance=1e-8), torch.tensor([[0.3, -0.1]], dtype=F64)
    for _ in range(4):
        action = controller(state)
        torch.testing.assert_close(action, balancer(tolerance=1e-8)(state), rtol=0, atol=1e-5)
        state = pendulum(state, action) + 0.02


def test_batches_single_states_tensors_and_arrays():
    states = torch.tensor([[0.5, -0.3], [0.1, 0.9], [0.0, 0.2]], dtype=F64)
    whole = simple()(states)
    assert whole.shape == (3, 2)
    assert whole.dtype == F64
    for row in range(3):
        single = simple()(states[row])
        assert single.shape == (2,)
        torch.testing.assert_close(single, whole[row], rtol=0, atol=1e-3)
    for given in (states.numpy(), states[0].numpy(), states.float().numpy()):
        action = simple()(given)
        assert isinstance(action, np.ndarray)
        assert action.dtype == given.dtype
        assert action.shape == given.shape
        np.testing.assert_allclose(
            action, whole.numpy().reshape(3, 2)[: len(given)] if given.ndim == 2 else whole[0], atol=1e-3
        )
    assert not whole.requires_grad


def test_other_solvers_serve_too():
    state = torch.tensor([[0.8, -0.6]], dtype=F64)
    for solver in (ProjectedGradient(polish=1), ILQR(second_order=False)):
        controller = simple(solver=solver)
        path = run(controller, state, 6, integrator)
        assert float(path[-1].abs().max()) < 0.1
        torch.testing.assert_close(simple(solver=solver)(state), simple()(state), rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", [ILQR(), ProjectedGradient(polish=1)], ids=["ilqr", "projected-gradient"])
def test_a_lost_row_acts_by_its_last_plan(solver):
    controller = simple(solver=solver)
    states = torch.tensor([[0.9, -0.9], [0.8, 0.7], [-0.5, 0.4]], dtype=F64)
    first = controller(states)
    planned = controller.plan.actions[:, 1]
    states = integrator(states, first)
    states[1] = math.nan
    second = controller(states)
    assert torch.isfinite(second).all()
    torch.testing.assert_close(second[1], planned[1], rtol=0, atol=1e-12)
    assert controller.timing().fallbacks == 1
    alone = simple(solver=solver)
    for state, wanted in ((torch.tensor([[0.9, -0.9]], dtype=F64), first[0]), (states[:1], second[0])):
        torch.testing.assert_close(alone(state)[0], wanted, rtol=0, atol=1e-4)
    # The sensor comes back, and the row goes on from what it met.
    states = integrator(torch.nan_to_num(states, 0.3), second)
    third = controller(states)
    assert controller.timing().fallbacks == 1
    torch.testing.assert_close(third, simple()(states), rtol=0, atol=1e-3)


def test_rows_lost_for_long_use_up_the_plan():
    controller = simple()
    state = torch.tensor([[0.9, -0.9], [0.8, 0.7]], dtype=F64)
    controller(state)
    planned = controller.plan.actions[1]
    state[1] = math.nan
    for step in range(1, 9):
        torch.testing.assert_close(controller(state)[1], planned[min(step, 5)], rtol=0, atol=1e-12)
    assert controller.timing().fallbacks == 8


def test_nan_at_the_first_call_is_an_error():
    with pytest.raises(NonFiniteError, match="rows \\[1\\]"):
        simple()(torch.tensor([[0.0, 0.0], [math.nan, 0.0]], dtype=F64))


def clock(reference, **settings):
    options = dict(horizon=4, action_dim=1, low=-10.0, high=10.0)
    return Controller(
        lambda s, u: s + u,
        lambda s, u, t: -(s[..., 0] + u[..., 0] - reference[t]).square() - 1e-6 * u.square().sum(-1),
        **(options | settings),
    )


def test_steps_count_from_the_last_reset():
    reference = torch.sin(torch.arange(30, dtype=F64))
    controller, state = clock(reference), torch.zeros(1, 1, dtype=F64)
    for t in range(8):
        state = state + controller(state)
        torch.testing.assert_close(state[0, 0], reference[t], rtol=0, atol=1e-3)
    assert controller.step == 8
    controller.reset()
    assert controller.step == 0
    assert controller.timing().calls == 0
    assert controller.plan is None
    state = torch.zeros(1, 1, dtype=F64)
    for t in range(2):
        state = state + controller(state)
        torch.testing.assert_close(state[0, 0], reference[t], rtol=0, atol=1e-3)


def test_some_rows_can_be_reset():
    controller = balancer()
    states = torch.tensor([[0.3, 0.0], [-0.2, 0.1]], dtype=F64)
    action = controller(states)
    states = pendulum(states, action)
    controller.reset(torch.tensor([False, True]))
    states[1] = torch.tensor([-0.35, -0.2], dtype=F64)
    action = controller(states)
    assert controller.step == 2
    torch.testing.assert_close(action[1:], balancer()(states[1:]), rtol=0, atol=1e-2)
    with pytest.raises(ShapeError, match="mask"):
        controller.reset(torch.tensor([True]))
    controller.reset(torch.tensor([True, True]))
    assert controller.step == 0
    assert controller(states[:1]).shape == (1, 1)


@pytest.mark.parametrize("constrained", [False, True])
def test_a_row_does_not_notice_that_another_is_reset(constrained):
    """Nor does the reset row notice that it has company, up to the tolerance."""

    def slow(state, action):
        return state[..., 1:].abs() - 1.0

    def begin():
        limits = {"constraint": slow, "terminal_constraint": lambda s: slow(s, None)} if constrained else {}
        return balancer(max_steps=1, low=-60.0, high=60.0, **limits)

    def run(resets):
        controller, plans = begin(), []
        states = torch.tensor([[0.9, 0.0], [-0.4, 0.1], [0.7, 0.3]], dtype=F64)
        for call in range(8):
            if call in resets:
                controller.reset(torch.tensor([False, True, False]))
                states = torch.stack([states[0], fresh[0], states[2]])
            action = controller(states)
            plans.append(controller.plan.actions)
            states = pendulum(states, action) + torch.tensor([0.1, 0.1]) * (-1) ** call
        return torch.stack(plans)

    fresh = torch.tensor([[0.6, -0.3]], dtype=F64)
    plain, reset, alone = run([]), run([4]), begin()
    controller = begin()
    controller(torch.cat([fresh, fresh]))
    controller.reset(torch.tensor([False, False]))
    controller(torch.cat([fresh, fresh]))
    assert constrained or controller.plan.solution.steps.max() <= 1, "no row was reset, so there is no first solve"
    assert torch.equal(plain[:, [0, 2]], reset[:, [0, 2]])
    assert not torch.equal(plain[4:, 1], reset[4:, 1])
    torch.testing.assert_close(reset[4, 1:2, 0], alone(fresh), rtol=1e-3, atol=1e-3)


def test_each_row_has_its_own_first_guess():
    """A hill with two sides: the first guess decides, and each row has one."""
    guesses = torch.tensor([0.4, -0.4], dtype=torch.float64)[:, None, None].expand(2, 3, 1)
    controller = Controller(
        lambda s, a: s + a,
        lambda s, a: -((s[..., 0] + a[..., 0]).square() - 1).square(),
        horizon=3,
        action_dim=1,
        init_actions=guesses,
        solver=ProjectedGradient(),
    )
    action = controller(torch.zeros(2, 1, dtype=torch.float64))
    assert action[:, 0].sign().tolist() == [1, -1]


def test_a_reset_row_forgets_its_plan():
    """After a reset the first guess decides, here between the two sides of a hill."""

    def hill(state, action):
        return -((state[..., 0] + action[..., 0]).square() - 0.25).square() - 0.01 * action.square().sum(-1)

    controller = Controller(lambda s, u: s, hill, horizon=2, action_dim=1, init_actions=0.4)
    states = torch.zeros(2, 1, dtype=F64)
    assert (controller(states) > 0).all()
    controller._actions = -controller._actions
    assert (controller(states) < 0).all()
    controller.reset(torch.tensor([True, False]))
    action = controller(states)
    assert float(action[0]) > 0
    assert float(action[1]) < 0


@pytest.mark.parametrize(
    "state", [torch.zeros(3, dtype=torch.long), np.zeros((2, 2), dtype=np.int64), torch.zeros(1, 2, 2)]
)
def test_states_of_another_kind_are_refused(state):
    with pytest.raises(ShapeError, match="floats"):
        simple()(state)


def test_mistakes_are_named():
    controller = simple()
    controller(torch.zeros(2, 2, dtype=F64))
    with pytest.raises(ShapeError, match=r"3 rows.*reset\(\)"):
        controller(torch.zeros(3, 2, dtype=F64))
    with pytest.raises(ShapeError, match="horizon=0"):
        simple(horizon=0)
    with pytest.raises(SolverError, match="max_steps=0"):
        simple(max_steps=0)


def test_constraints_hold_in_closed_loop():
    """A point mass hurries to 1; its speed must not pass .4."""

    def mass(state, action):
        place, speed = state.unbind(-1)
        return torch.stack([place + 0.1 * speed, speed + 0.1 * action[..., 0]], -1)

    def controller(**settings):
        return Controller(
            mass,
            lambda s, u: -(s[..., 0] - 1).square() - 0.01 * u[..., 0].square(),
            horizon=10,
            action_dim=1,
            low=-2.0,
            high=2.0,
            **settings,
        )

    state = torch.zeros(1, 2, dtype=F64)
    free = run(controller(), state, 20, mass)
    assert float(free[..., 1].max()) > 0.6
    kept = controller(constraint=lambda s, u: s[..., 1:] - 0.4, terminal_constraint=lambda s: s[..., 1:] - 0.4)
    path = run(kept, state, 20, mass)
    assert float(path[..., 1].max()) <= 0.4 + 1e-3
    assert float(path[..., 1].max()) >= 0.4 - 1e-2
    assert float(path[-1, 0, 0]) > 0.6
    assert kept.timing().fallbacks == 0


def slow(state, action):
    return state.abs() - 0.8


def test_a_controller_is_pickled_in_its_loop():
    controller = simple(constraint=slow, terminal_constraint=partial(torch.sub, other=0.9))
    state = controller(torch.tensor([0.7, -0.5], dtype=F64))
    copy = pickle.loads(pickle.dumps(controller))
    assert torch.equal(controller(state), copy(state))


def test_float32():
    path = run(balancer(), torch.tensor([[0.3, 0.0]]), 20, disturbance=0.01)
    assert path.dtype == torch.float32
    assert float(path[-3:, :, 0].abs().max()) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("calls", [1, 2, 3, 40])
def test_it_recovers_from_states_that_violate_a_constraint(dtype, calls):
    """Too fast for some calls, whatever the actions, and then at rest: some calls later it acts as a fresh controller."""

    def moved(state, action):
        speed = state[..., 1] + 0.1 * action[..., 0]
        return torch.stack((state[..., 0] + 0.1 * speed, speed), -1)

    def reach(state, action):
        return -(state[..., 0] - 1).square() - 0.05 * action[..., 0].square()

    def limited():
        bounds = {"low": -2.0, "high": 2.0, "constraint": lambda s, a: s[..., 1:] - 0.5}
        return Controller(moved, reach, horizon=10, action_dim=1, **bounds)

    controller, state = limited(), torch.tensor([[0.0, 0.1]], dtype=dtype)
    controller(state)
    for _ in range(calls):
        controller(torch.tensor([[0.0, 3.0]], dtype=dtype))
        assert controller.status.tolist() == [Status.INFEASIBLE]
    for call in range(6):
        action = controller(state)
        if call > 0:
            assert controller.status.item() in (Status.CONVERGED, Status.MAX_STEPS)
            assert action.item() == pytest.approx(limited()(state).item(), abs=0.1)
        state = moved(state, action)
    assert controller.fallbacks == 0


@pytest.mark.parametrize("push", [0.0, 3.0])
def test_it_becomes_feasible_after_a_step_of_the_goal_or_a_push(push):
    """The problem needs 1000 times the weight that holds it at rest, which takes several calls of six rounds."""

    def moved(state, action):
        speed = state[..., 1] + 0.1 * action[..., 0]
        return torch.stack((state[..., 0] + 0.1 * speed, speed), -1)

    def reach(state, action, t):
        goal = torch.where(t < 4, 0.0, 3.0 - push).to(F64)
        return -(state[..., 0] - goal - 1e-2).square() - 0.05 * action[..., 0].square()

    both = lambda s, a: torch.stack((s[..., 1] - 0.5, -s[..., 1] - 0.5), -1)  # noqa: E731
    controller = Controller(moved, reach, horizon=12, action_dim=1, low=-2.0, high=2.0, constraint=both)
    state, statuses = torch.zeros(1, 2, dtype=F64), []
    for call in range(16):
        action = controller(state)
        statuses.append(controller.status.item())
        state = moved(state, action) - (call == 3) * torch.tensor([[push, 0.0]], dtype=F64)
    assert Status.INFEASIBLE not in statuses[10:], statuses


def test_a_reset_row_without_a_plan_does_not_act_by_its_guess():
    controller = simple()
    controller(torch.zeros(2, 2))
    controller.reset(torch.tensor([True, False]))
    with pytest.raises(NonFiniteError, match=r"rows \[0\] \(of 2\), which have no earlier plan"):
        controller(torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"init_actions": torch.zeros(7)}, "init_actions has shape"), ({"low": torch.zeros(3)}, "low has shape")],
)
def test_shapes_of_bounds_and_guesses_are_named(settings, words):
    with pytest.raises(ShapeError, match=words):
        simple(**settings)(torch.zeros(2, 2))


@pytest.mark.usefixtures("unchecked")
def test_masks_and_states_are_checked():
    controller = simple()
    with pytest.raises(ShapeError, match="the state is"):
        controller(torch.zeros(0, 2))
    controller(torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="boolean mask"):
        controller.reset([0, 1])
    with pytest.raises(ShapeError, match="the last call had 2"):
        controller(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"torch\.float64 on cpu, but the last call had torch\.float32"):
        controller(torch.zeros(2, 2, dtype=F64))
    controller.reset()
    assert controller(torch.zeros(2, 2, dtype=F64)).dtype == F64


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_a_measured_state_beyond_its_limit_is_not_infeasible(noise):
    """Along a limit of the speed, with noise of the measurement: 14 and 22 of 40 calls were infeasible."""

    def mass(state, action):
        place, speed = state.unbind(-1)
        return torch.stack([place + 0.1 * speed, speed + 0.1 * action[..., 0]], -1)

    def limit(state, action=None):
        return torch.stack((-state[..., 1] - 0.3, state[..., 1] - 0.3), -1)

    controller = Controller(
        mass,
        lambda s, a: -10 * s[..., 0].square() - 0.1 * s[..., 1].square() - 0.01 * a[..., 0].square(),
        horizon=10,
        action_dim=1,
        low=-8.0,
        high=8.0,
        constraint=limit,
        terminal_constraint=limit,
    )
    generator, state, statuses = torch.Generator().manual_seed(0), torch.tensor([1.5, 0.0], dtype=F64), []
    for _ in range(40):
        action = controller(state)
        statuses.append(controller.status.item())
        state = mass(state, action) + noise * torch.randn(2, generator=generator, dtype=F64)
    assert statuses.count(Status.CONVERGED) >= 36
    assert Status.INFEASIBLE not in statuses
