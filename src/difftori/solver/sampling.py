"""Solvers that only evaluate the cost: the cross-entropy method, and MPPI as in TD-MPC.

All rows use the same random numbers, so the solution of a row does not depend on the other rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from difftori.solver.interface import Problem, Solver, State
from difftori.solver.objective import Objective
from difftori.solver.settings import check_settings
from difftori.types import Points


@dataclass(frozen=True)
class CEM(Solver):
    """The cross-entropy method: sample around the mean, then fit mean and standard deviation to the best (Rubinstein, 1999).

    `samples` K: points per step. `elites`: the number of best samples to fit to. `std`: the first standard deviation, in units
    of x. `min_std`: its lower limit.
    """

    samples: int = 512
    elites: int = 64
    std: float = 0.5
    min_std: float = 0.01

    def __post_init__(self):
        check_settings(self, samples="[1, inf)")
        check_settings(self, elites=f"[1, {self.samples}]", std="(0, inf)", min_std="[0, inf)")

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate the first mean."""
        return State(problem.score(x.unsqueeze(0))[0], None, (torch.full_like(x, self.std),))

    def compilable(self, objective: Objective) -> bool:
        """True for every objective."""
        return True

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """Sample, select the elites, and fit mean and standard deviation."""
        (std,) = state.memory
        elites, _ = _elites(problem, x, std, self.samples, self.elites)
        mean = problem.project(elites.mean(1))  # rounding can move the mean of equal numbers out of the box
        variance = (elites - mean.unsqueeze(1)).square().mean(1)
        # The smallest normal number keeps the derivative of the root finite if all elites are one point.
        std = (variance + torch.finfo(x.dtype).tiny).sqrt().clamp_min(self.min_std)
        return mean, State(problem.score(mean.unsqueeze(0))[0], None, (std,))


@dataclass(frozen=True)
class MPPI(Solver):
    """Model predictive path integral control as in TD-MPC (Hansen et al., 2022): fit to elites weighted by their return.

    Each step evaluates `samples` points plus `solve(..., candidates=)` (TD-MPC's 25 policy trajectories). The `elites` best
    are weighted by exp(`temperature` × (return − best return)); `temperature` is in units of 1/cost. The mean moves by
    1 − `momentum` towards their weighted mean. Their weighted standard deviation, between `min_std` and `std`, is used in the
    next step. After a solve, `solution.state.memory` holds (std (B n), elites (B E n), weights (B E)), from which TD-MPC samples
    the plan that it executes.
    """

    samples: int = 512
    elites: int = 64
    temperature: float = 0.5
    momentum: float = 0.1
    std: float = 2.0
    min_std: float | Tensor = 0.05

    def __post_init__(self):
        check_settings(self, samples="[1, inf)")
        check_settings(
            self,
            elites=f"[1, {self.samples}]",
            std="(0, inf)",
            min_std="[0, inf)",
            temperature="[0, inf)",
            momentum="[0, 1)",
        )

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate the first mean."""
        elites = x.detach().unsqueeze(1).repeat(1, self.elites, 1)
        weights = x.new_full((x.shape[0], self.elites), 1.0 / self.elites)
        return State(problem.score(x.unsqueeze(0))[0], None, (torch.full_like(x, self.std), elites, weights))

    def compilable(self, objective: Objective) -> bool:
        """True for every objective."""
        return True

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """Sample, weight the elites, and fit mean and standard deviation."""
        elites, costs = _elites(problem, x, state.memory[0], self.samples, self.elites)
        weights = torch.softmax(-self.temperature * costs, dim=1)
        mean = (weights.unsqueeze(-1) * elites).sum(1)
        variance = (weights.unsqueeze(-1) * (elites - mean.unsqueeze(1)).square()).sum(1)
        std = (variance + torch.finfo(x.dtype).tiny).sqrt().clamp_min(self.min_std).clamp_max(self.std)
        mean = problem.project(self.momentum * x + (1 - self.momentum) * mean)
        return mean, State(problem.score(mean.unsqueeze(0))[0], None, (std, elites, weights))


def _elites(problem: Problem, mean: Points, std: Points, samples: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of the samples and the given candidates: points (B E n) and their costs (B E)."""
    noise = torch.randn(samples, 1, mean.shape[-1], generator=problem.generator, dtype=mean.dtype, device=mean.device)
    points = problem.project(mean + std * noise)
    if problem.candidates is not None:
        points = torch.cat([points, problem.project(problem.candidates)])
    costs = problem.score(points)
    # A sample with infinite or undefined cost is excluded.
    costs = torch.where(torch.isfinite(costs), costs, torch.finfo(costs.dtype).max)
    best_costs, index = costs.topk(count, dim=0, largest=False)
    best = points.gather(0, index.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
    return best.movedim(0, 1), best_costs.movedim(0, 1)
