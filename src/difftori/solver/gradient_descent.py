"""Projected gradient descent with one step length for all, which may be learned."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver.method import Problem, Solver, State
from difftori.solver.objective import Objective
from difftori.types import Points


@dataclass(frozen=True)
class GradientDescent(Solver):
    """x ← P(x − α∇J), every step taken.

    `step_size` α is a number, or a tensor with one element: unrolled, its gradient is that of a learned step length.
    α is in units of x² per cost: a cost multiplied by s needs α/s. Smooth in all that it uses, where a line search or a spectral step jumps.
    """

    step_size: float | Tensor = field(default=0.1, compare=False)

    def __post_init__(self):
        if isinstance(self.step_size, float) and not self.step_size > 0:
            raise SolverError(f"GradientDescent: step_size={self.step_size} must be > 0.")
        if isinstance(self.step_size, Tensor) and self.step_size.numel() != 1:
            raise SolverError(
                f"GradientDescent: step_size has shape {tuple(self.step_size.shape)}; give one number for all rows."
            )

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate."""
        cost, grad = problem.evaluate(x)
        return State(cost, grad)

    def compilable(self, objective: Objective) -> bool:
        """Always."""
        return True

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One step."""
        assert state.grad is not None
        alpha = torch.as_tensor(self.step_size).to(x)
        x = problem.project(x - alpha * state.grad)
        cost, grad = problem.evaluate(x)
        return x, State(cost, grad)
