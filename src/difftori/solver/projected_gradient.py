"""Spectral projected gradient: the default solver."""

from dataclasses import dataclass

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver.method import Problem, Solver, State, all_finite, choose
from difftori.solver.newton import Newton
from difftori.solver.objective import Objective
from difftori.types import Points, RowFlags, Rows


@dataclass(frozen=True)
class ProjectedGradient(Solver):
    """x ← P(x − α∇J) with a Barzilai–Borwein step α of each row's own, and a per-row safeguard against rising costs.

    One evaluation of cost and gradient a step. A trial that does not lower the cost enough is refused and the step
    shortened. The long step ‖s‖²/sᵀy and the short one sᵀy/‖y‖² take turns. Source: Birgin, Martínez and Raydan (2000),
    "Nonmonotone spectral projected gradient methods on convex sets".

    `first_move`: the first step moves the steepest coordinate by this share of its range (or by this much where the box
    is open), unless `first_step` gives α itself, in units of x² per cost, as suits a cost whose curvature is known. `window`: a trial is compared with the highest of the last so many costs; 1 is monotone, the cost of a row
    never rises; 5 needs fewer steps on ill-conditioned problems. `armijo`: the share of the predicted decrease that a
    trial must reach. `polish`: Newton steps on the free set after the iterations, outside their budget, which turn a good
    solution into an exact one; `polish_with` is their method.
    """

    first_move: float = 0.25
    first_step: float | None = None
    window: int = 1
    armijo: float = 1e-4
    polish: int = 0
    polish_with: Newton = Newton(lengths=(1.0, 0.25))

    def __post_init__(self):
        if self.window < 1 or self.polish < 0 or self.first_move <= 0:
            raise SolverError(
                f"ProjectedGradient: window={self.window} must be ≥ 1, polish={self.polish} ≥ 0 "
                f"and first_move={self.first_move} > 0."
            )

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate, and choose the first step length."""
        cost, grad = problem.evaluate(x)
        alpha = self._first_step(problem, x, grad)
        recent = cost.detach().unsqueeze(-1).repeat(1, self.window)
        return State(cost, grad, (_representable(alpha), torch.ones_like(cost.detach()), recent))

    def compilable(self, objective: Objective) -> bool:
        """Always."""
        return True

    def _first_step(self, problem: Problem, x: Points, grad: Points) -> Rows:
        if self.first_step is not None:
            return torch.full_like(grad[:, 0], self.first_step)
        reach = problem.box.narrowest(x, 1.0) * self.first_move
        steepest = grad.abs().amax(-1)
        # A row that starts where the gradient vanishes needs no first step; 1 is as good as any.
        return torch.where(steepest > 0, reach / steepest.clamp_min(torch.finfo(x.dtype).tiny), 1.0)

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One trial per row: taken if it lowers the cost enough, else shortened for the next time."""
        alpha, turn, recent = state.memory
        assert state.grad is not None
        trial = problem.project(x - alpha[:, None] * state.grad)
        cost, grad = problem.evaluate(trial)
        move, bend = trial - x, grad - state.grad
        slope = (state.grad * move).sum(-1)
        noise = 4 * torch.finfo(x.dtype).eps * state.cost.abs()
        taken = (cost <= recent.amax(-1) + self.armijo * slope + noise) & all_finite(cost, grad)
        longer = _spectral(move, bend, alpha, turn > 0)
        alpha = torch.where(taken, longer, _shorter(state.cost, cost, slope, alpha))
        now = torch.where(taken, cost, state.cost)
        recent = torch.cat([recent[:, 1:], now.detach().unsqueeze(-1)], -1)
        memory = (alpha, torch.where(taken, -turn, turn), recent)
        return choose(taken, trial, x), State(now, choose(taken, grad, state.grad), memory)

    def finish(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """`polish` Newton steps on the free set."""
        if self.polish == 0:
            return x, state
        assert state.grad is not None
        inner = State(state.cost, state.grad)
        for _ in range(self.polish):
            x, inner = self.polish_with.step(problem, x, inner)
        return x, State(inner.cost, inner.grad, state.memory)


def _spectral(move: Points, bend: Points, alpha: Rows, long: RowFlags) -> Rows:
    """‖s‖²/sᵀy or sᵀy/‖y‖², and a longer step than the last where the curvature along s is not positive."""
    # αy has the unit of s, so that no square of a gradient leaves the range of float32.
    bend = alpha.detach()[:, None] * bend
    curvature = (move * bend).sum(-1)
    bends = curvature > torch.finfo(move.dtype).tiny
    # `where` before dividing: the unused branch must stay finite, or its derivative would poison the used one.
    square = torch.where(bends, bend.square().sum(-1), 1.0)
    step = torch.where(long, move.square().sum(-1) / torch.where(bends, curvature, 1.0), curvature / square)
    return _representable(torch.where(bends, alpha.detach() * step, 4.0 * alpha))


def _shorter(cost: Rows, trial_cost: Tensor, slope: Rows, alpha: Rows) -> Rows:
    """The minimiser of the parabola through the refused trial, kept within a tenth and a half of its step."""
    excess = trial_cost - cost - slope
    sound = torch.isfinite(excess) & (excess > torch.finfo(cost.dtype).tiny)
    shrink = torch.where(sound, -slope / (2.0 * torch.where(sound, excess, 1.0)), 0.1)
    return _representable(alpha * shrink.clamp(0.1, 0.5))


def _representable(alpha: Rows) -> Rows:
    """Neither zero nor infinite; nothing else, for the size of a step depends on the scale of the cost."""
    tiny = torch.finfo(alpha.dtype).tiny
    return alpha.clamp(tiny, 1 / tiny)
