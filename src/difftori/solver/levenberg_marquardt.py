"""Levenberg–Marquardt and Gauss–Newton for stacked residuals, and the release's variant for a plain cost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver.derivatives import row_jacobian
from difftori.solver.interface import Problem, Solver, State, choose
from difftori.solver.newton import improves
from difftori.solver.objective import LeastSquaresObjective, Objective
from difftori.solver.settings import check_settings
from difftori.types import Points, Residuals, Rows


@dataclass(frozen=True)
class LevenbergMarquardt(Solver):
    """Δ = −α(JᵀJ + λI)⁻¹Jᵀr, projected onto the box.

    On a `LeastSquaresObjective`, r and J are its residuals and their Jacobian (the smaller of the n×n and r×r systems is
    factorised), and λ is `damping` × mean(diag JᵀJ), so the result does not depend on the scale of the cost.

    On any other cost, the residual is the single number r = offset + cost = offset − G. Its JᵀJ has rank one, so the step has
    the closed form Δ = −α r ∇J/(‖∇J‖² + λ) with λ = `damping`. The authors' release computes the same step with a Cholesky
    factorisation of an n×n matrix (offset 1000, fixed damping, steps never rejected). The method decreases r². Choose an
    offset above the largest return: if offset + cost is negative, the step increases the cost. `offset` is in units of the
    cost and `damping` in units of ‖∇J‖²: multiply a cost by s, the offset by s and the damping by s².

    `adaptive`: a step that does not lower the cost is rejected and λ is multiplied by `grow`; otherwise λ is multiplied by
    `shrink`.
    """

    damping: float = 1e-3
    step_size: float = 1.0
    offset: float = 0.0
    adaptive: bool = False
    grow: float = 4.0
    shrink: float = 1 / 3

    def __post_init__(self):
        check_settings(
            self, damping="[0, inf)", step_size="(0, inf)", offset="(-inf, inf)", grow="[1, inf)", shrink="(0, 1]"
        )

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate. Every row starts with the same damping."""
        cost, grad = problem.evaluate(x)
        return State(cost, grad, (torch.full_like(cost.detach(), self.damping),))

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One step. With fixed damping it is always taken."""
        (damping,) = state.memory
        trial = problem.project(x + self.step_size * self._direction(problem, x, state, damping))
        cost, grad = problem.evaluate(trial)
        if not self.adaptive:
            return trial, State(cost, grad, (damping,))
        taken = improves(problem, x, state, trial, cost, grad)
        damping = torch.where(taken, damping * self.shrink, damping * self.grow)
        unit = self.damping if self.damping > 0 else 1.0
        damping = damping.clamp(1e-12 * unit, 1e12 * unit)
        assert state.grad is not None
        now = State(torch.where(taken, cost, state.cost), choose(taken, grad, state.grad), (damping,))
        return choose(taken, trial, x), now

    def compilable(self, objective: Objective) -> bool:
        """True for a single residual. Stacked residuals are linearised by autograd and cannot be compiled."""
        return not isinstance(objective, LeastSquaresObjective)

    def _direction(self, problem: Problem, x: Points, state: State, damping: Rows) -> Points:
        assert state.grad is not None
        if isinstance(problem.objective, LeastSquaresObjective):
            residual, jacobian = _linearise(problem, x, state.grad)
            return damped_step(residual, jacobian, damping * _mean_square(jacobian))
        residual = self.offset + state.cost
        squared = state.grad.square().sum(-1) + damping
        return -(residual / squared.clamp_min(torch.finfo(x.dtype).tiny))[:, None] * state.grad


@dataclass(frozen=True)
class GaussNewton(Solver):
    """Δ = −(JᵀJ)⁻¹Jᵀr on a `LeastSquaresObjective`, with the longest of `lengths` that lowers the cost, projected.

    `ridge` × mean(diag JᵀJ) is added to the diagonal, so that a rank-deficient J does not fail.
    """

    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.0625)
    ridge: float = 1e-10

    def __post_init__(self):
        check_settings(self, lengths="(0, inf)", ridge="[0, inf)")

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate cost and gradient."""
        if not isinstance(problem.objective, LeastSquaresObjective):
            raise SolverError(
                f"GaussNewton needs residuals, but the objective is a {type(problem.objective).__name__}. "
                "Fix: use a LeastSquaresObjective, or ProjectedGradient() or LevenbergMarquardt(offset=…)."
            )
        cost, grad = problem.evaluate(x)
        return State(cost, grad)

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One step with line search."""
        assert state.grad is not None
        residual, jacobian = _linearise(problem, x, state.grad)
        direction = damped_step(residual, jacobian, self.ridge * _mean_square(jacobian.detach()))
        for length in self.lengths:
            trial = problem.project(x + length * direction)
            cost, grad = problem.evaluate(trial)
            taken = improves(problem, x, state, trial, cost, grad)
            x = choose(taken, trial, x)
            assert state.grad is not None
            state = State(torch.where(taken, cost, state.cost), choose(taken, grad, state.grad))
            direction = direction * ~taken[:, None]
        return x, state


def _linearise(problem: Problem, x: Points, grad: Points) -> tuple[Residuals, Tensor]:
    """Residuals (B r) and their Jacobian (B r n). The columns of coordinates with an active bound are zero."""
    assert isinstance(problem.objective, LeastSquaresObjective)
    with torch.enable_grad():
        point = x if problem.create_graph and x.requires_grad else x.detach().requires_grad_()
        residual = problem.objective.residual(point)
        jacobian = row_jacobian(residual, point, problem.create_graph)
    if not problem.create_graph:
        residual, jacobian = residual.detach(), jacobian.detach()
    free = ~problem.box.held(x, grad.detach())
    return residual, jacobian * free.unsqueeze(-2)


def _mean_square(jacobian: Tensor) -> Rows:
    """mean(diag JᵀJ)."""
    return jacobian.square().sum((-1, -2)) / jacobian.shape[-1]


def damped_step(residual: Residuals, jacobian: Tensor, damping: Rows) -> Points:
    """−(JᵀJ + λI)⁻¹Jᵀr, by the smaller of the n×n and the r×r system."""
    r, n = jacobian.shape[-2:]
    transposed = jacobian.transpose(-1, -2)
    wide = r < n
    gram = jacobian @ transposed if wide else transposed @ jacobian
    size = min(r, n)
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    floor = torch.finfo(gram.dtype).eps * gram.detach().diagonal(dim1=-1, dim2=-2).sum(-1)
    tiny = torch.finfo(gram.dtype).tiny
    cholesky, failed = torch.linalg.cholesky_ex(gram + (damping + floor + tiny)[:, None, None] * identity)
    # A matrix that cannot be factorised is replaced by an upper bound: the result is a sufficiently short gradient step.
    bound = floor / torch.finfo(gram.dtype).eps
    fallback = (bound + damping.detach() + tiny).sqrt()[:, None, None] * identity
    cholesky = torch.where((failed == 0)[:, None, None], cholesky, fallback)
    rhs = residual.unsqueeze(-1) if wide else transposed @ residual.unsqueeze(-1)
    solved = torch.cholesky_solve(rhs, cholesky)
    return -((transposed @ solved) if wide else solved).squeeze(-1)
