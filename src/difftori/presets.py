"""Preset planners: the settings of the authors' release, and recommended settings of this library (docs/benchmarks.md)."""

from difftori.errors import SolverError
from difftori.planning import Planner
from difftori.solver import Box, Implicit, LevenbergMarquardt, Newton, ProjectedGradient, Truncated


def fast(box: Box | None = None) -> Planner:
    """For inference, and for training where speed matters: 10 spectral steps, implicit gradient by 4 Hessian products."""
    return Planner(
        ProjectedGradient(window=5), Implicit(linear="cg", products=4), box or Box(), max_steps=10, tolerance=0.0
    )


def accurate(box: Box | None = None) -> Planner:
    """For training, the default: 30 spectral steps, two Newton steps on the free set, implicit gradient by 16 products.

    On the paper's problem sizes its gradient is that of the optimum on nearly all rows (docs/benchmarks.md).
    For small n, or curvatures that differ by orders of magnitude, `Newton()` with the dense `Implicit()` is more reliable.
    """
    polish = Newton(linear="cg", products=12, lengths=(1.0, 0.25))
    solver = ProjectedGradient(window=5, polish=2, polish_with=polish)
    return Planner(solver, Implicit(linear="cg", products=16), box or Box(), max_steps=30)


_RELEASE_RL: dict[str, tuple[int, float, float]] = {
    # task: iterations, step size, damping, per task as listed in the paper's appendix
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


def reference_rl(task: str = "cheetah-run", box: Box | None = None) -> Planner:
    """The release's solve for a DeepMind Control task: LM on r = 1000 − G, fixed damping, truncated after 5 steps.

    The release computes its loss on the last iterate and executes the best one, as `Planner.acting()` does.

    Raises:
        SolverError: the task is not one of the paper's 15.
    """
    task = "cup-catch" if task == "ball-in-cup-catch" else task
    if task not in _RELEASE_RL:
        raise SolverError(
            f"reference_rl: the paper has no settings for {task!r}. Fix: use one of {', '.join(_RELEASE_RL)}."
        )
    iterations, step_size, damping = _RELEASE_RL[task]
    solver = LevenbergMarquardt(offset=1000.0, step_size=step_size, damping=damping)
    return Planner(solver, Truncated(5), box or Box(), iterations, tolerance=0.0, keep="last", clamp_in_cost=True)


def reference_il(batch_size: int = 128, box: Box | None = None) -> Planner:
    """The release's solve for MetaWorld imitation, per sample: LM on r = 1000 − f, step 3e-5, damping 0.01 × batch size.

    The release solves the whole batch as one problem with residual mean(1000 − f), which couples the samples through
    ‖∇f‖². Solving each sample separately with its damping multiplied by the batch size gives the same steps if the
    gradients of the samples have similar norms.
    """
    solver = LevenbergMarquardt(offset=1000.0, step_size=3e-5, damping=0.01 * batch_size)
    return Planner(solver, Truncated(5), box or Box(), 100, tolerance=0.0, keep="last")
