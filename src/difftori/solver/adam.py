"""Projected Adam."""

from dataclasses import dataclass

import torch

from difftori.solver.interface import Problem, Solver, State
from difftori.solver.objective import Objective
from difftori.solver.settings import check_settings
from difftori.types import Points


@dataclass(frozen=True)
class Adam(Solver):
    """Adam on the variables, projected onto the box after each step (Kingma and Ba, 2015).

    Differs from paper: `epsilon` is relative to the largest coordinate of the row's first gradient, so the result does not
    depend on the scale of the cost.
    """

    lr: float = 0.3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self):
        check_settings(self, lr="(0, inf)", beta1="[0, 1)", beta2="[0, 1)", epsilon="[0, inf)")

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate cost and gradient. Both moments start at zero."""
        cost, grad = problem.evaluate(x)
        unit = torch.linalg.vector_norm(grad, float("inf"), -1)
        unit = torch.where(unit > 0, unit, 1.0)
        return State(cost, grad, (torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(cost), unit))

    def compilable(self, objective: Objective) -> bool:
        """True for every objective."""
        return True

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One Adam step with bias-corrected moments."""
        mean, square, count, unit = state.memory
        assert state.grad is not None
        count = (count + 1).detach()
        relative = state.grad / unit[:, None]
        mean = self.beta1 * mean + (1 - self.beta1) * relative
        square = self.beta2 * square + (1 - self.beta2) * relative.square()
        mean_hat = mean / (1 - self.beta1**count)[:, None]
        square_hat = square / (1 - self.beta2**count)[:, None]
        # Adding the smallest normal number keeps the derivative of the root finite where a gradient is exactly zero.
        root = (square_hat + torch.finfo(x.dtype).tiny).sqrt()
        x = problem.project(x - self.lr * mean_hat / (root + self.epsilon))
        cost, grad = problem.evaluate(x)
        return x, State(cost, grad, (mean, square, count, unit))
