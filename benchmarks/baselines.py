"""Adapters to the baselines, Theseus 0.2.3 and mpc.pytorch 0.0.6, which solve the same problems with their own solvers.

The library does not import this module, and the baselines are imported inside functions only: `make baselines` installs
them. Each adapter uses the settings recommended by the baseline; differences are documented in its docstring.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.control_problems import ControlProblem
from benchmarks.solver_pendulum import TIME_STEP, TORQUE, pendulum_next
from difftori.errors import MissingExtraError
from difftori.types import Actions, Plans, Points, Rows, States

ContextCost = Callable[[Tensor, Tensor], Tensor]
"""(x: (B n), context: (B Z)) -> cost (B). The context is passed, not captured: Theseus maps over rows one by one."""

_NEVER = -1.0


def _theseus() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import theseus  # pyright: ignore[reportMissingImports]
    except ImportError as missing:
        raise MissingExtraError(f"Theseus is not installed ({missing}). Fix: make baselines.") from missing
    return theseus


def require_baselines() -> dict[str, str]:
    """The versions of both baselines. Raises MissingExtraError with the install command if one is missing."""
    _theseus()
    return {"theseus-ai": version("theseus-ai")} | require_mpc()


def require_mpc() -> dict[str, str]:
    """The version of mpc.pytorch. Raises MissingExtraError with the install command if it is missing."""
    _mpc()
    return {"mpc": version("mpc")}


def theseus_lm(
    cost: ContextCost,
    x0: Points,
    context: Float[Tensor, "B Z"],
    *,
    iterations: int = 100,
    step_size: float = 1e-4,
    damping: float = 1e-3,
    offset: float = 1000.0,
    truncated_steps: int | None = 5,
    autograd_mode: str | None = None,
) -> Points:
    """Theseus' LevenbergMarquardt with CholeskyDenseSolver on one scalar residual per row, as in the release.

    Minimises ½ r², r = offset + cost = offset − G, from x0, with fixed damping λI. The last `truncated_steps` iterations are
    differentiated by unrolling, with respect to `context` and every tensor that `cost` closes over; None: solve without a
    graph. The tolerances are set so that it does not stop early. `autograd_mode` is Theseus' option: its default "vmap",
    except for a single row, where "dense" is faster.
    """
    autograd_mode = autograd_mode or ("dense" if x0.shape[0] == 1 else "vmap")
    th = _theseus()
    variable = th.Vector(tensor=x0.detach().clone(), name="x")
    auxiliary = th.Variable(context, name="context")

    def residual(optim_vars, aux_vars) -> Tensor:
        return (offset + cost(optim_vars[0].tensor, aux_vars[0].tensor)).unsqueeze(-1)

    objective = th.Objective(dtype=x0.dtype)
    weight = th.ScaleCostWeight(x0.new_ones(1, 1))
    objective.add(th.AutoDiffCostFunction([variable], residual, 1, weight, [auxiliary], autograd_mode=autograd_mode))
    optimizer = th.LevenbergMarquardt(
        objective,
        linear_solver_cls=th.CholeskyDenseSolver,
        max_iterations=iterations,
        step_size=step_size,
        abs_err_tolerance=_NEVER,
        rel_err_tolerance=_NEVER,
    )
    layer = th.TheseusLayer(optimizer)
    inputs = {"x": x0.detach().clone(), "context": context}
    if truncated_steps is None:
        with torch.no_grad():
            values, _ = layer.forward(inputs, optimizer_kwargs={"damping": damping})
    else:
        options = {"damping": damping, "backward_mode": "truncated", "backward_num_iterations": truncated_steps}
        values, _ = layer.forward(inputs, optimizer_kwargs=options)
    return values["x"]


def theseus_lm_flattened(
    cost: ContextCost,
    x0: Points,
    context: Float[Tensor, "B Z"],
    *,
    iterations: int = 100,
    step_size: float = 3e-5,
    damping: float = 0.01,
    offset: float = 1000.0,
    truncated_steps: int | None = 5,
) -> Points:
    """The imitation release's method: the whole batch as ONE problem of B·n variables with residual mean(offset − f).

    Each iteration therefore factorises a (B·n)×(B·n) matrix, and rows are coupled through ‖g‖².
    """
    rows, n = x0.shape

    def mean_cost(x: Tensor, flat_context: Tensor) -> Rows:
        return cost(x.reshape(rows, n), flat_context.reshape(rows, -1)).mean().reshape(1)

    solution = theseus_lm(
        mean_cost,
        x0.reshape(1, rows * n),
        context.reshape(1, -1),
        iterations=iterations,
        step_size=step_size,
        damping=damping,
        offset=offset,
        truncated_steps=truncated_steps,
    )
    return solution.reshape(rows, n)


def _mpc() -> ModuleType:
    """The module of mpc.pytorch, with a patch for one function that fails in current torch (a mask of bytes)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mpc import mpc, util  # pyright: ignore[reportMissingImports]
    except ImportError as missing:
        raise MissingExtraError(f"mpc.pytorch is not installed ({missing}). Fix: make baselines.") from missing
    util.bdiag = torch.diag_embed
    return mpc


class _PendulumDynamics(nn.Module):
    """The pendulum in the format of mpc.pytorch: a module, with its Jacobian for GradMethods.ANALYTIC."""

    def __init__(self, parameters: Tensor):
        super().__init__()
        self.per_row = parameters

    def _rows(self, state: Tensor) -> Tensor:
        return self.per_row.repeat(state.shape[0] // self.per_row.shape[0], 1)

    def forward(self, state: States, action: Actions) -> States:
        return pendulum_next(state, action, self._rows(state))

    def grad_input(self, state: States, action: Actions) -> tuple[Tensor, Tensor]:
        """∂next/∂state (B 3 3) and ∂next/∂action (B 3 1)."""
        gravity, mass, length = self._rows(state).unbind(-1)
        cos, sin, _ = state.unbind(-1)
        next_state = self.forward(state, action)
        square = cos.square() + sin.square()
        zero, one = torch.zeros_like(cos), torch.ones_like(cos)
        speed = torch.stack([zero, TIME_STEP * 1.5 * gravity / length, one, TIME_STEP * 3.0 / (mass * length**2)], -1)
        angle = torch.stack([-sin / square, cos / square, zero, zero], -1) + TIME_STEP * speed
        jacobian = torch.stack([-next_state[:, 1:2] * angle, next_state[:, :1] * angle, speed], 1)
        return jacobian[:, :, :3], jacobian[:, :, 3:]


def mpc_pendulum(
    start: States,
    parameters: Float[Tensor, "B 3"],
    quadratic: Float[Tensor, "4 4"],
    linear: Float[Tensor, "4"],
    *,
    horizon: int = 20,
    iterations: int = 50,
    tolerance: float = 1e-3,
    analytic: bool = False,
) -> Points:
    """mpc.pytorch's box-constrained iLQR on the pendulum, |u| ≤ 2: torques (B H), differentiable in all arguments.

    Settings as in its pendulum example (50 iterations, decay .2, at most 5 line-search steps, tolerance 1e-3 of
    PendulumDx). The Jacobians are computed by autograd as there or, with `analytic`, given. Rows are differentiated whether
    or not they converged.
    """
    mpc = _mpc()
    rows = start.shape[0]
    controller = mpc.MPC(
        3,
        1,
        horizon,
        u_lower=-TORQUE,
        u_upper=TORQUE,
        lqr_iter=iterations,
        grad_method=mpc.GradMethods.ANALYTIC if analytic else mpc.GradMethods.AUTO_DIFF,
        verbose=-1,
        eps=tolerance,
        n_batch=rows,
        linesearch_decay=0.2,
        max_linesearch_iter=5,
        exit_unconverged=False,
        detach_unconverged=False,
    )
    cost = mpc.QuadCost(quadratic.expand(horizon, rows, 4, 4), linear.expand(horizon, rows, 4))
    with contextlib.redirect_stdout(io.StringIO()):  # its warnings are prints
        _, torques, _ = controller(start, cost, _PendulumDynamics(parameters))
    return torques.squeeze(-1).transpose(0, 1)


class _CartpoleDynamics(nn.Module):
    """The cart-pole with state (position, cos θ, sin θ, and the rates), in which the cost is quadratic."""

    def __init__(self, problem: ControlProblem, parameters: Tensor):
        super().__init__()
        self.dynamics = problem.functions(parameters).dynamics

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        position, cos, sin, speed, turning = state.unbind(-1)
        angle = torch.atan2(sin, cos)
        return _with_circle(self.dynamics(torch.stack([position, angle, speed, turning], -1), action))

    def grad_input(self, state: States, action: Actions) -> tuple[Tensor, Tensor]:
        """∂next/∂state (B 5 5) and ∂next/∂action (B 5 1), differentiable in the parameters."""
        return torch.func.vmap(torch.func.jacrev(self.forward, argnums=(0, 1)))(state, action)


def _with_circle(state: Tensor) -> Tensor:
    """(B 4) → (B 5): the angle as its cosine and sine."""
    position, angle, speed, turning = state.unbind(-1)
    return torch.stack([position, angle.cos(), angle.sin(), speed, turning], -1)


def mpc_cartpole(
    problem: ControlProblem,
    start: States,
    init_actions: Plans,
    parameters: Float[Tensor, "Z"],
    *,
    iterations: int = 200,
    tolerance: float = 1e-5,
) -> Plans:
    """mpc.pytorch's box-constrained iLQR on the benchmark's cart-pole: actions (B H A), differentiable in `parameters`.

    Its quadratic cost represents the problem exactly, with the angle on a circle and one more step for the terminal cost. Of
    the settings that were tried, these reach the optimum: 200 iterations, 20 of them without improvement, a line search
    that halves up to 10 times. (With 50 iterations and its default decay of .2 it ends at a cost of 74.) The Jacobians
    are given: computing them by autograd (GradMethods.AUTO_DIFF) takes 3 to 4 times as long. In both cases its derivative
    omits the second derivatives of the dynamics: at the optimum, its relative error against finite differences is .64.
    """
    mpc = _mpc()
    rows, horizon, _ = init_actions.shape
    stage = start.new_tensor([[0.2, 0.0, 0.0, 0.02, 0.02, 0.002], [0.0, -1.0, 0.0, 0.0, 0.0, 0.0]])
    last = start.new_tensor([[20.0, 0.0, 0.0, 20.0, 20.0, 0.002], [0.0, -100.0, 0.0, 0.0, 0.0, 0.0]])
    quadratic, linear = torch.stack([*[stage] * horizon, last]).unsqueeze(2).expand(-1, -1, rows, -1).unbind(1)
    controller = mpc.MPC(
        5,
        1,
        horizon + 1,
        u_lower=problem.low[0],
        u_upper=problem.high[0],
        u_init=torch.cat([init_actions, init_actions[:, -1:]], 1).transpose(0, 1).contiguous(),
        lqr_iter=iterations,
        grad_method=mpc.GradMethods.ANALYTIC,
        verbose=-1,
        eps=tolerance,
        n_batch=rows,
        linesearch_decay=0.5,
        max_linesearch_iter=10,
        not_improved_lim=20,
        exit_unconverged=False,
        detach_unconverged=False,
    )
    cost = mpc.QuadCost(torch.diag_embed(quadratic), linear)
    with contextlib.redirect_stdout(io.StringIO()):  # its warnings are prints
        _, actions, _ = controller(_with_circle(start), cost, _CartpoleDynamics(problem, parameters))
    return actions[:-1].transpose(0, 1)
