"""The pendulum against hand-computed values, its own symmetries, and mpc.pytorch."""

import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difftori.envs.pendulum import (
    TASKS,
    PendulumParameters,
    pendulum,
    pendulum_cost,
    pendulum_step,
    sample_starts,
)
from difftori.errors import ConfigError, ShapeError
from difftori.registry import make_env


def state(angle: float, velocity: float) -> torch.Tensor:
    return torch.tensor([[math.cos(angle), math.sin(angle), velocity]], dtype=torch.float64)


def torque(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def random_problem(rows: int, horizon: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(0)
    angle, velocity = generator.uniform(-4, 4, rows), generator.normal(0, 4, rows)
    starts = torch.as_tensor(np.stack([np.cos(angle), np.sin(angle), velocity], axis=1))
    return starts, torch.as_tensor(generator.uniform(-2, 2, (rows, horizon, 1)))


def test_undamped_step_equals_the_hand_computed_value():
    after = pendulum("undamped").step(state(math.pi / 2, 1.0), torque(0.5))
    velocity = 1.0 + 0.05 * (15.0 + 1.5)
    assert torch.allclose(after, state(math.pi / 2 + 0.05 * velocity, velocity), atol=1e-12)


def test_damping_acts_on_the_angle_and_the_offset_inside_the_sine():
    after = pendulum("damped").step(state(-0.7, 2.0), torque(-1.0))
    velocity = 2.0 + 0.05 * (15.0 * math.sin(-0.7 + 0.1) - 3.0 + 0.7)
    assert torch.allclose(after, state(-0.7 + 0.05 * velocity, velocity), atol=1e-12)


def test_every_parameter_stands_where_the_equation_puts_it():
    parameters = PendulumParameters(g=7.0, m=2.0, l=0.5, damping=0.3, offset=-0.2)
    after = pendulum_step(state(0.4, -1.0), torque(1.2), parameters, dt=0.1)
    velocity = -1.0 + 0.1 * (3 * 7 / (2 * 0.5) * math.sin(0.4 - 0.2) + 3 * 1.2 / (2 * 0.25) - 0.3 * 0.4)
    assert torch.allclose(after, state(0.4 + 0.1 * velocity, velocity), atol=1e-12)


def test_torque_is_clamped_and_has_no_gradient_outside():
    problem = pendulum("undamped")
    inside, outside = torque(1.5).requires_grad_(), torque(5.0).requires_grad_()
    assert torch.equal(problem.step(state(0.3, 0.0), outside), problem.step(state(0.3, 0.0), torque(2.0)))
    problem.step(state(0.3, 0.0), inside)[0, 2].backward()
    problem.step(state(0.3, 0.0), outside)[0, 2].backward()
    assert inside.grad.item() == pytest.approx(0.15)
    assert outside.grad.item() == 0.0


def test_spring_torque_jumps_where_the_pendulum_hangs():
    """The angle comes from atan2, so just left and right of straight down the spring pulls in opposite directions."""
    damped, still = pendulum("damped"), torque(0.0)
    left, right = damped.step(state(math.pi - 1e-9, 0.0), still), damped.step(state(math.pi + 1e-9, 0.0), still)
    assert left[0, 2] - right[0, 2] == pytest.approx(-0.05 * 2 * math.pi, abs=1e-6)


def test_gradients_match_finite_differences_in_states_torques_and_parameters():
    starts, actions = random_problem(3, 4)

    def total(start, controls, g, m, l, damping, offset):
        parameters = PendulumParameters(g, m, l, damping, offset)
        for t in range(controls.shape[1]):
            start = pendulum_step(start, controls[:, t], parameters)
        return start

    values = [torch.tensor(v, dtype=torch.float64) for v in (9.0, 1.3, 0.8, 0.5, 0.1)]
    inputs = [x.clone().requires_grad_() for x in (starts, actions, *values)]
    assert torch.autograd.gradcheck(total, inputs)


def test_parameters_may_differ_by_row():
    starts, actions = random_problem(2, 1)
    masses = torch.tensor([1.0, 2.0], dtype=torch.float64)
    together = pendulum_step(starts, actions[:, 0], PendulumParameters(m=masses))
    for row, mass in enumerate(masses.tolist()):
        alone = pendulum_step(starts[row : row + 1], actions[row : row + 1, 0], PendulumParameters(m=mass))
        assert torch.allclose(together[row : row + 1], alone, atol=1e-14)


def test_cost_equals_the_hand_computed_value():
    states = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, -1.0]]], dtype=torch.float64)
    actions = torch.tensor([[[2.0], [0.0]]], dtype=torch.float64)
    first = 0.5 * (1 + 0.1 * 4 + 0.001 * 4)
    second = 0.5 * (1 + 0.1) - 1
    assert pendulum_cost(states, actions).item() == pytest.approx(first + second, abs=1e-12)


def test_cost_is_differentiable_in_learnt_weights():
    starts, actions = random_problem(2)
    states = pendulum("undamped").rollout(starts, actions)
    quadratic = torch.ones(4, dtype=torch.float64, requires_grad=True)
    linear = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    pendulum_cost(states, actions, quadratic=quadratic, linear=linear).sum().backward()
    assert torch.allclose(linear.grad, torch.cat((states, actions), dim=2).sum(dim=(0, 1)))
    assert torch.allclose(quadratic.grad, 0.5 * torch.cat((states, actions), dim=2).square().sum(dim=(0, 1)))


def test_cost_refuses_more_than_one_torque():
    with pytest.raises(ShapeError, match="one torque"):
        pendulum_cost(torch.zeros(2, 5, 3), torch.zeros(2, 5, 2))


def test_rollout_begins_with_the_start_and_the_last_control_moves_nothing():
    problem = pendulum("damped")
    starts, actions = random_problem(4)
    states = problem.rollout(starts, actions)
    assert states.shape == (4, 20, 3)
    assert torch.equal(states[:, 0], starts)
    assert torch.equal(states[:, 1], problem.step(starts, actions[:, 0]))
    changed = actions.clone()
    changed[:, -1] = 0.0
    assert torch.equal(problem.rollout(starts, changed), states)
    assert torch.allclose(
        problem.cost(starts, actions) - problem.cost(starts, changed), 0.0005 * actions[:, -1, 0] ** 2
    )


def test_cost_counts_controls_as_executed():
    starts, actions = random_problem(3)
    problem = pendulum("undamped")
    assert torch.equal(problem.cost(starts, 5 * actions), problem.cost(starts, (5 * actions).clamp(-2, 2)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.sampled_from(TASKS))
def test_rows_never_interact(row, task):
    starts, actions = random_problem(7)
    alone = pendulum(task).cost(starts[row : row + 1], actions[row : row + 1])
    assert torch.allclose(pendulum(task).cost(starts, actions)[row], alone[0], rtol=1e-12)


def test_mirror_image_costs_the_same_without_damping():
    starts, actions = random_problem(5)
    mirrored = starts * torch.tensor([1.0, -1.0, -1.0])
    problem = pendulum("undamped")
    assert torch.allclose(problem.cost(starts, actions), problem.cost(mirrored, -actions), rtol=1e-10)


def test_starts_lie_in_their_ranges_and_follow_the_seed():
    starts = sample_starts(2000, np.random.default_rng(3))
    assert starts.dtype == torch.float32
    assert torch.equal(starts, sample_starts(2000, np.random.default_rng(3)))
    angle = torch.atan2(starts[:, 1], starts[:, 0])
    assert angle.abs().max() <= math.pi / 2 + 1e-6
    assert angle.abs().max() > 1.5
    assert starts[:, 2].abs().max() <= 1.0
    assert starts[:, 2].abs().max() > 0.99
    assert angle.mean().abs() < 0.1


def test_spec_describes_the_problem():
    spec = pendulum("").spec
    assert (spec.obs_dim, spec.action_dim, spec.horizon, spec.low, spec.high) == (3, 1, 20, (-2.0,), (2.0,))


def test_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="'wet' is unknown.*undamped, damped"):
        pendulum("wet")


def test_environment_repeats_the_pure_functions():
    env = make_env("pendulum:damped", num_envs=3, seed=1, unit_actions=False)
    observations, _ = env.reset()
    actions = np.array([[0.5], [-3.0], [2.0]])
    after, rewards, terminated, truncated, info = env.step(actions)
    problem, start = pendulum("damped"), torch.as_tensor(observations)
    executed = torch.as_tensor(actions.clip(-2, 2), dtype=torch.float32)
    assert np.allclose(after, problem.step(start, executed).numpy(), atol=1e-5)
    assert np.allclose(rewards, -pendulum_cost(start[:, None], executed[:, None]).numpy(), atol=1e-5)
    assert not terminated.any()
    assert not truncated.any()
    assert info["clipped"].tolist() == [0, 1, 0]


def test_clipped_actions_are_counted_over_the_episode_and_forgotten_after_it():
    env = make_env("pendulum", num_envs=1, seed=0, max_steps=3)
    counts = []
    for _ in range(2):
        counts.append(env.reset()[1]["clipped"].item())
        counts += [env.step(np.full((1, 1), 9.0))[4]["clipped"].item() for _ in range(3)]
    assert counts == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("values", [{"num_envs": 0}, {"max_steps": 0}])
def test_make_refuses_empty_environments(values):
    with pytest.raises(ConfigError, match="at least 1"):
        make_env("pendulum", **({"num_envs": 2, "seed": 0} | values))


def test_reset_refuses_options():
    with pytest.raises(ConfigError, match="low"):
        make_env("pendulum", num_envs=1, seed=0).reset(options={"low": 1})


@pytest.fixture
def mpc_modules():
    """mpc.pytorch's pendulum and its `mpc.mpc`, with the global matplotlib style it sets on import undone."""
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mpc", reason="mpc.pytorch is not installed: make baselines")
        modules = importlib.import_module("mpc.env_dx.pendulum"), importlib.import_module("mpc.mpc")
        yield modules
        mpl.rcParams.update(before)


@pytest.mark.baselines
@pytest.mark.parametrize("task", TASKS)
def test_dynamics_and_cost_equal_mpc_pytorch(task, mpc_modules):
    dynamics, solver = mpc_modules
    true = (10.0, 1.0, 1.0) if task == "undamped" else (10.0, 1.0, 1.0, 1.0, 0.1)
    theirs = dynamics.PendulumDx(torch.tensor(true, dtype=torch.float64), simple=task == "undamped")
    starts, actions = random_problem(50)
    assert torch.allclose(pendulum(task).step(starts, 2 * actions[:, 0]), theirs(starts, 2 * actions[:, 0]), atol=1e-12)
    q, p = (weight.double().expand(20, 50, 4) for weight in theirs.get_true_obj())
    expected = solver.util.get_cost(
        20, actions.transpose(0, 1), solver.QuadCost(torch.diag_embed(q), p), theirs, x_init=starts
    )
    assert torch.allclose(pendulum(task).cost(starts, actions), expected, rtol=1e-5)
