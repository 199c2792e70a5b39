"""Projected gradient descent with one step length for all rows, which may be learned."""

from dataclasses import dataclass, field

from torch import Tensor

from difftori.errors import SolverError
from difftori.solver.box import number_like
from difftori.solver.interface import Problem, Solver, State
from difftori.solver.objective import Objective
from difftori.solver.settings import check_settings
from difftori.types import Points


@dataclass(frozen=True)
class GradientDescent(Solver):
    """x ← P(x − α∇J). Every step is taken.

    `step_size` α is a number or a tensor with one element, in units of x² per cost: multiply a cost by s and divide α by s.
    Default: 0.1. With `Unrolled`, a tensor receives a gradient, so the step length can be learned. The result is smooth in
    its inputs, without the jumps of a line search or a spectral step.
    """

    step_size: float | Tensor = field(default=0.1, compare=False)

    def __post_init__(self):
        check_settings(self, step_size="(0, inf)")
        if isinstance(self.step_size, Tensor) and self.step_size.numel() != 1:
            raise SolverError(
                f"GradientDescent: step_size has shape {tuple(self.step_size.shape)}. Fix: use one number for all rows."
            )

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate cost and gradient."""
        cost, grad = problem.evaluate(x)
        return State(cost, grad)

    def compilable(self, objective: Objective) -> bool:
        """True for every objective."""
        return True

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One step."""
        assert state.grad is not None
        alpha = number_like(self.step_size, x)
        x = problem.project(x - alpha * state.grad)
        cost, grad = problem.evaluate(x)
        return x, State(cost, grad)
