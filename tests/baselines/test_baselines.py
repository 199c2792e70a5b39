"""Our solvers against Theseus 0.2.3 and mpc.pytorch 0.0.6 (`make baselines` installs them)."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import mpc_pendulum, require_baselines, theseus_lm, theseus_lm_flattened
from benchmarks.solver_pendulum import pendulum_next, pendulum_problem, quadratic_cost
from difftori.solver import ILQR, Implicit, LevenbergMarquardt, ProjectedGradient, Truncated, solve

pytestmark = pytest.mark.baselines

F64 = torch.float64
needs_theseus = pytest.mark.skipif(
    importlib.util.find_spec("theseus") is None, reason="Theseus is absent: run `make baselines`"
)
needs_mpc = pytest.mark.skipif(
    importlib.util.find_spec("mpc") is None, reason="mpc.pytorch is absent: run `make baselines`"
)


def _network(seed: int, inputs: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.ELU(), nn.Linear(32, 1))
    return net.to(F64).requires_grad_(False)


class _Task:
    """Minus the score of a random network, begun at random points; a random functional of the solution."""

    def __init__(self, seed: int, rows: int = 4, n: int = 6, context: int = 5):
        self.network = _network(seed, n + context)
        self.context, self.x0 = torch.randn(rows, context, dtype=F64), 0.3 * torch.randn(rows, n, dtype=F64)
        self.weights = torch.randn(rows, n, dtype=F64)

    def cost(self, x: Tensor, context: Tensor) -> Tensor:
        return -self.network(torch.cat([x, context], -1)).squeeze(-1)

    def gradient(self, method) -> tuple[Tensor, Tensor]:
        """The solution, and the functional's gradient with respect to the context."""
        context = self.context.clone().requires_grad_()
        x = method(context)
        (grad,) = torch.autograd.grad((x * self.weights).sum(), context)
        return x.detach(), grad


@needs_mpc
@needs_theseus
def test_the_baselines_are_the_versions_that_were_measured():
    assert require_baselines() == {"theseus-ai": "0.2.3", "mpc": "0.0.6"}


@needs_theseus
@pytest.mark.parametrize("mode", ["vmap", "dense"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_closed_form_is_theseus_levenberg_marquardt(seed: int, mode: str):
    """100 iterations as released, and the truncated gradient. Damping 1: the map is a contraction nowhere near chaos."""
    task = _Task(seed)
    settings = {"iterations": 100, "step_size": 1e-5, "damping": 1.0, "offset": 1000.0}

    def theirs(context: Tensor) -> Tensor:
        return theseus_lm(task.cost, task.x0, context, truncated_steps=5, autograd_mode=mode, **settings)

    def ours(context: Tensor) -> Tensor:
        solver = LevenbergMarquardt(damping=1.0, step_size=1e-5, offset=1000.0)
        return solve(
            lambda x: task.cost(x, context),
            task.x0,
            solver=solver,
            adjoint=Truncated(5),
            max_steps=100,
            keep="last",
            tolerance=0.0,
        ).x

    (x, grad), (x_ours, grad_ours) = task.gradient(theirs), task.gradient(ours)
    assert float((x - task.x0).abs().max()) > 0.01  # it moved
    torch.testing.assert_close(x_ours, x, rtol=0, atol=1e-5)
    assert float(torch.cosine_similarity(grad, grad_ours, dim=-1).min()) > 0.99999
    torch.testing.assert_close(grad_ours, grad, rtol=1e-3, atol=1e-9)


@needs_theseus
def test_the_closed_form_follows_the_release_until_its_map_turns_chaotic():
    """At the release's own step and damping, the first 20 iterations agree; later ones amplify rounding."""
    task = _Task(0)
    theirs = theseus_lm(task.cost, task.x0, task.context, iterations=20, truncated_steps=None)
    solver = LevenbergMarquardt(damping=1e-3, step_size=1e-4, offset=1000.0)
    ours = solve(lambda x: task.cost(x, task.context), task.x0, solver=solver, max_steps=20, keep="last", tolerance=0.0)
    torch.testing.assert_close(ours.x.detach(), theirs, rtol=0, atol=1e-5)


@needs_theseus
def test_gradients_reach_the_parameters_that_the_cost_captures():
    task = _Task(0)
    task.network.requires_grad_(True)
    x = theseus_lm(task.cost, task.x0, task.context, iterations=6, damping=1.0)
    grads = torch.autograd.grad((x * task.weights).sum(), list(task.network.parameters()), allow_unused=True)
    assert sum(float(g.abs().sum()) for g in grads if g is not None) > 0
    detached = theseus_lm(task.cost, task.x0, task.context, iterations=6, truncated_steps=None)
    assert not detached.requires_grad


@needs_theseus
def test_the_flattened_batch_is_one_problem_with_the_mean_residual():
    """x ← x + α r̄ ∇f̄ / (‖∇f̄‖² + λ), f̄ the mean over the batch: samples are coupled."""
    task = _Task(1)
    theirs = theseus_lm_flattened(task.cost, task.x0, task.context, iterations=10, truncated_steps=None)
    x = task.x0.clone()
    for _ in range(10):
        point = x.requires_grad_()
        residual = 1000.0 + task.cost(point, task.context).mean()
        (jacobian,) = torch.autograd.grad(residual, point)
        x = (x - 3e-5 * residual * jacobian / (jacobian.square().sum() + 0.01)).detach()
    torch.testing.assert_close(theirs, x, rtol=0, atol=1e-6)


@needs_mpc
@pytest.mark.parametrize("analytic", [False, True])
def test_ilqr_finds_mpcs_solution_of_the_pendulum(analytic: bool):
    problem = pendulum_problem(4, F64, spread=0.4)
    theirs = mpc_pendulum(
        problem.state,
        problem.context,
        *quadratic_cost(problem.state),
        tolerance=1e-7,
        iterations=200,
        analytic=analytic,
    )
    ours = solve(problem, problem.x0, solver=ILQR(), box=problem.box, max_steps=60)
    assert theirs.shape == problem.x0.shape
    torch.testing.assert_close(ours.x.detach(), theirs, rtol=0, atol=1e-3)
    # theirs stops where the cost no longer falls by its threshold; ours must not be worse
    assert bool((problem.cost(ours.x.detach()) <= problem.cost(theirs.detach()) + 1e-9).all())
    spectral = solve(problem, problem.x0, solver=ProjectedGradient(polish=4), box=problem.box, max_steps=300)
    torch.testing.assert_close(spectral.x.detach(), ours.x.detach(), rtol=0, atol=1e-4)


@needs_mpc
def test_our_pendulum_gradient_is_that_of_finite_differences():
    """mpc.pytorch's, which leaves out the dynamics' second derivatives, is not held to it."""
    problem = pendulum_problem(3, F64, seed=1, horizon=12)
    weights = torch.randn(problem.x0.shape, dtype=F64)

    def solution(parameters: Tensor) -> Tensor:
        # The torque's own curvature is .001: what is left of the gradient counts a thousandfold in the solution, and the
        # usual floor under curvatures would raise it.
        return solve(
            problem.at(parameters),
            problem.x0,
            solver=ProjectedGradient(polish=8),
            adjoint=Implicit(eigenvalue_floor=1e-12),
            box=problem.box,
            max_steps=300,
            tolerance=1e-13,
        ).x

    parameters = problem.context.clone().requires_grad_()
    (grad,) = torch.autograd.grad((solution(parameters) * weights).sum(), parameters)
    step = 1e-4
    for index in range(3):
        shift = torch.zeros(3, dtype=F64)
        shift[index] = step
        with torch.no_grad():
            up, down = solution(problem.context + shift), solution(problem.context - shift)
        numeric = ((up - down) * weights).sum(-1) / (2 * step)
        torch.testing.assert_close(grad[:, index], numeric, rtol=1e-4, atol=1e-5)
    theirs = problem.context.clone().requires_grad_()
    x = mpc_pendulum(problem.state, theirs, *quadratic_cost(problem.state), horizon=12)
    (baseline,) = torch.autograd.grad((x * weights).sum(), theirs)
    assert bool(torch.isfinite(baseline).all())


@needs_mpc
def test_the_jacobian_given_to_mpc_is_that_of_the_pendulum():
    from benchmarks.baselines import _PendulumDynamics

    problem = pendulum_problem(3, F64)
    dynamics = _PendulumDynamics(problem.context)
    action = torch.randn(3, 1, dtype=F64)
    by_state, by_action = dynamics.grad_input(problem.state, action)
    for row in range(3):
        jacobians = torch.autograd.functional.jacobian(
            lambda s, a, row=row: pendulum_next(s[None], a[None], problem.context[row : row + 1])[0],
            (problem.state[row], action[row]),
        )
        torch.testing.assert_close(by_state[row], jacobians[0])
        torch.testing.assert_close(by_action[row], jacobians[1])
