"""Named settings: the authors' release, number by number, and what measured well here (docs/benchmarks.md)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver.adjoint import Adjoint, Detached, Implicit, Truncated
from difftori.solver.box import Box
from difftori.solver.levenberg_marquardt import LevenbergMarquardt
from difftori.solver.method import Solver
from difftori.solver.newton import Newton
from difftori.solver.objective import Objective, RowSelection, as_objective
from difftori.solver.projected_gradient import ProjectedGradient
from difftori.solver.solution import Solution
from difftori.solver.solve import solve
from difftori.types import Points, Rows


@dataclass(frozen=True)
class Preset:
    """A solver, an adjoint and a budget that belong together.

    `clamp_in_cost`: the release's way with bounds. x is clamped inside the cost instead of by the solver, so that
    coordinates outside have no gradient and stay there, and the result may lie outside the box.
    """

    solver: Solver
    adjoint: Adjoint
    max_steps: int
    keep: Literal["best", "last"] = "best"
    tolerance: float | None = None
    clamp_in_cost: bool = False

    def solve(
        self,
        objective: Objective | Callable[[Tensor], Tensor],
        x0: Points,
        *,
        box: Box | None = None,
        generator: torch.Generator | None = None,
        compile: bool = False,
    ) -> Solution:
        """`difftori.solver.solve` with these settings."""
        if self.clamp_in_cost and box is not None:
            objective, box = ClampedObjective(as_objective(objective), box.to(x0)), None
        return solve(
            objective,
            x0,
            solver=self.solver,
            adjoint=self.adjoint,
            box=box,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            keep=self.keep,
            generator=generator,
            compile=compile,
        )

    def acting(self) -> "Preset":
        """The same solver without a derivative."""
        return replace(self, adjoint=Detached())


class ClampedObjective(Objective):
    """Another objective at the nearest point of the box: bounds as the release has them."""

    def __init__(self, inner: Objective, box: Box):
        self.inner, self.box = inner, box

    def cost(self, x: Points) -> Rows:
        """The inner cost at clamp(x)."""
        return self.inner.cost(
            torch.clamp(x, torch.as_tensor(self.box.low).to(x), torch.as_tensor(self.box.high).to(x))
        )

    def select(self, rows: RowSelection) -> "Objective | None":
        """Some rows, where the inner objective can be split and the bounds are the same for all of them."""
        inner = self.inner.select(rows)
        shared = all(torch.as_tensor(bound).dim() < 2 for bound in (self.box.low, self.box.high))
        return ClampedObjective(inner, self.box) if inner is not None and shared else None


def fast() -> Preset:
    """Acting, and training where speed counts: 10 spectral steps, implicit gradient by 4 Hessian products."""
    return Preset(ProjectedGradient(window=5), Implicit(linear="cg", products=4), max_steps=10, tolerance=0.0)


def accurate() -> Preset:
    """Training, the default: 30 spectral steps, two Newton steps on the free set, implicit gradient by 16 products.

    On the paper's problem sizes its gradient is that of the optimum on practically all rows (docs/benchmarks.md).
    Where n is small or curvatures lie many orders apart, `Newton()` and `Implicit()`, dense, are the surer choice.
    """
    polish = Newton(linear="cg", products=12, lengths=(1.0, 0.25))
    solver = ProjectedGradient(window=5, polish=2, polish_with=polish)
    return Preset(solver, Implicit(linear="cg", products=16), max_steps=30)


_RELEASE_RL: dict[str, tuple[int, float, float]] = {
    # task: iterations, step size, damping, per task as the paper's appendix lists them
    "cartpole-swingup-sparse": (50, 1e-3, 0.5),
    "cheetah-run": (100, 1e-4, 1e-3),
    "cup-catch": (100, 1e-4, 1e-2),
    "finger-spin": (100, 1e-4, 1e-2),
    "finger-turn-easy": (50, 1e-3, 1e-1),
    "finger-turn-hard": (50, 1e-3, 1e-1),
    "hopper-stand": (50, 1e-3, 1e-2),
    "pendulum-swingup": (100, 1e-4, 1e-3),
    "quadruped-run": (100, 1e-4, 1e-1),
    "quadruped-walk": (100, 1e-4, 1e-1),
    "reacher-easy": (100, 1e-4, 1e-2),
    "reacher-hard": (100, 1e-4, 1e-2),
    "walker-run": (200, 3e-5, 1e-3),
    "walker-stand": (100, 1e-4, 1e-2),
    "walker-walk": (100, 1e-4, 1e-2),
}


def reference_rl(task: str = "cheetah-run", keep: Literal["best", "last"] = "last") -> Preset:
    """The release's solve for a DeepMind Control task: LM on r = 1000 − G, fixed damping, truncated after 5.

    The release executes the best iterate (`keep="best"`) and puts its loss on the last one (`keep="last"`).

    Raises:
        SolverError: the task is none of the paper's 15.
    """
    task = "cup-catch" if task == "ball-in-cup-catch" else task
    if task not in _RELEASE_RL:
        raise SolverError(f"reference_rl: the paper has no settings for {task!r}; it has {', '.join(_RELEASE_RL)}.")
    iterations, step_size, damping = _RELEASE_RL[task]
    solver = LevenbergMarquardt(offset=1000.0, step_size=step_size, damping=damping)
    return Preset(solver, Truncated(5), iterations, keep, tolerance=0.0, clamp_in_cost=True)


def reference_il(batch_size: int = 128) -> Preset:
    """The release's solve for MetaWorld imitation, per sample: LM on r = 1000 − f, step 3e-5, damping 0.01 × batch size.

    The release solves the whole batch as one problem with residual mean(1000 − f), which couples the samples through
    ‖∇f‖²; solving each alone with its damping multiplied by the batch size gives the same steps where the samples'
    gradients are of one size.
    """
    solver = LevenbergMarquardt(offset=1000.0, step_size=3e-5, damping=0.01 * batch_size)
    return Preset(solver, Truncated(5), 100, "last", tolerance=0.0)
