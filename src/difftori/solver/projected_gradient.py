"""Spectral projected gradient: the default solver."""

from dataclasses import dataclass

import torch
from torch import Tensor

from difftori.solver.interface import Problem, Solver, State, all_finite, choose
from difftori.solver.newton import Newton
from difftori.solver.objective import Objective
from difftori.solver.settings import check_settings
from difftori.types import Points, RowFlags, Rows


@dataclass(frozen=True)
class ProjectedGradient(Solver):
    """x ← P(x − α∇J) with a Barzilai–Borwein step length α for each row, and a safeguard against rising costs for each row.

    Each step is one evaluation of cost and gradient. A trial that does not lower the cost enough is rejected, and the step is
    shortened. The long step ‖s‖²/sᵀy and the short step sᵀy/‖y‖² alternate. Source: Birgin, Martínez and Raydan (2000),
    "Nonmonotone spectral projected gradient methods on convex sets".

    Args:
        first_move: the first step moves the steepest coordinate by this share of its range, or by this distance if the box
            is open. Default: 0.25.
        first_step: the first α itself, in units of x² per cost, for a cost of known curvature. Default: None, `first_move` applies.
        window: a trial is compared with the highest of the last `window` costs. With 1 the cost of a row never rises; 5
            needs fewer steps on ill-conditioned problems. Default: 1.
        armijo: the share of the predicted decrease that a trial must reach.
        polish: number of Newton steps on the free set after the iterations, not counted in the step limit. They make a good
            solution precise. Default: 0.
        polish_with: the solver of these Newton steps.
        exact_unrolling: whether `Unrolled` and `Truncated` differentiate the step lengths too, so that the gradient is that of the
            computation: for few steps, and for gradients to x0. Default: False, they are constants, and the gradient approaches
            that of the optimum in the directions in which x moves. That of the computation does not: the derivatives of the
            lengths grow from step to step.
    """

    first_move: float = 0.25
    first_step: float | None = None
    window: int = 1
    armijo: float = 1e-4
    polish: int = 0
    polish_with: Newton = Newton(lengths=(1.0, 0.25))
    exact_unrolling: bool = False

    def __post_init__(self):
        check_settings(self, window="[1, inf)", polish="[0, inf)", first_move="(0, inf)", first_step="(0, inf)")
        check_settings(self, armijo="[0, 1)")

    @property
    def monotone(self) -> bool:
        """True without a window of costs and without polishing."""
        return self.window == 1 and self.polish == 0

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate, and choose the first step length."""
        cost, grad = problem.evaluate(x)
        alpha = self._first_step(problem, x, grad if self.exact_unrolling else grad.detach())
        recent = cost.detach().unsqueeze(-1).repeat(1, self.window)
        return State(cost, grad, (_representable(alpha), torch.ones_like(cost.detach()), recent))

    def compilable(self, objective: Objective) -> bool:
        """True for every objective."""
        return True

    def _first_step(self, problem: Problem, x: Points, grad: Points) -> Rows:
        if self.first_step is not None:
            return torch.full_like(grad[:, 0], self.first_step)
        reach = problem.box.narrowest(x, 1.0) * self.first_move
        steepest = grad.abs().amax(-1)
        # A row that starts at a zero gradient needs no first step, so any value works.
        return torch.where(steepest > 0, reach / steepest.clamp_min(torch.finfo(x.dtype).tiny), 1.0)

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One trial per row: taken if it lowers the cost enough, otherwise the next step is shorter."""
        alpha, use_long_step, recent = state.memory
        assert state.grad is not None
        trial = problem.project(x - alpha[:, None] * state.grad)
        cost, grad = problem.evaluate(trial)
        s = trial - x
        # αy has the unit of s, so squares of gradients stay within the range of float32.
        moves = torch.stack((s, alpha.detach()[:, None] * (grad - state.grad), state.grad), 1)
        before, after = state.cost, cost
        if not self.exact_unrolling:
            moves, before, after = moves.detach(), before.detach(), after.detach()
        products = moves[:, :2] @ moves.mT  # all inner products of a row in one operation
        slope = products[:, 0, 2]
        noise = 4 * torch.finfo(x.dtype).eps * before.abs()
        highest = recent.amax(-1) if self.window > 1 else recent.squeeze(-1)
        taken = (after <= highest + self.armijo * slope + noise) & all_finite(after, grad)
        longer = torch.where(_still(s, x, alpha, state.grad), alpha, _spectral(products, alpha, use_long_step > 0))
        alpha = torch.where(taken, longer, _shorter(before, after, slope, alpha))
        now = torch.where(taken, cost, state.cost)
        latest = now.detach().unsqueeze(-1)
        recent = torch.cat([recent[:, 1:], latest], -1) if self.window > 1 else latest
        memory = (alpha, torch.where(taken, -use_long_step, use_long_step), recent)
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


def _still(s: Points, x: Points, alpha: Rows, grad: Points) -> RowFlags:
    """Which rows are at a first-order point: x stays, and not because rounding hides a step that is too short.

    A longer α has no effect there, but would amplify the derivatives of an unrolled solve.
    """
    hidden = (alpha[:, None] * grad).abs() <= torch.finfo(x.dtype).eps * x.abs()
    return ((s == 0) & ((grad == 0) | ~hidden)).all(-1)


def _spectral(products: Tensor, alpha: Rows, use_long_step: RowFlags) -> Rows:
    """‖s‖²/sᵀy or sᵀy/‖y‖², or a longer step than the last one if the curvature along s is not positive.

    `products` (B 2 3): the inner products of s and αy with s, αy and the gradient.
    """
    long, curvature, short = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
    positive = curvature > torch.finfo(alpha.dtype).tiny
    # `where` before the division: the unused branch must stay finite, otherwise its derivative would make the used one NaN.
    above = torch.where(use_long_step, long, curvature)
    below = torch.where(positive, torch.where(use_long_step, curvature, short), 1.0)
    return _representable(torch.where(positive, alpha.detach() * (above / below), 4.0 * alpha))


def _shorter(cost: Rows, trial_cost: Tensor, slope: Rows, alpha: Rows) -> Rows:
    """The minimiser of the parabola through the rejected trial, clamped to between a tenth and a half of its step."""
    excess = trial_cost - cost - slope
    sound = (excess > torch.finfo(cost.dtype).tiny) & (excess < torch.inf)
    shrink = torch.where(sound, -slope / (2.0 * torch.where(sound, excess, 1.0)), 0.1)
    return _representable(alpha * shrink.clamp(0.1, 0.5))


def _representable(alpha: Rows) -> Rows:
    """Clamp α so that it is neither zero nor infinite. There are no other limits, because α depends on the scale of the cost."""
    tiny = torch.finfo(alpha.dtype).tiny
    return alpha.clamp(tiny, 1 / tiny)
