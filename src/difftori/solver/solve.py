"""`solve`: run a solver on a batch of independent problems and differentiate the result with an adjoint."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from difftori.errors import NonFiniteError, ObjectiveError, SolverError
from difftori.solver.adjoint import Adjoint, Detached, Differentiated, Implicit, Iterates
from difftori.solver.augmented_lagrangian import AugmentedLagrangian, solve_constrained
from difftori.solver.box import Box
from difftori.solver.compiled import compiled_call
from difftori.solver.constraints import Constrained, ConstrainedFunction, Multipliers
from difftori.solver.contraction import Contraction
from difftori.solver.convergence import Convergence
from difftori.solver.derivatives import checked_cost
from difftori.solver.host_reads import reading_is_free
from difftori.solver.inference import without_inference_tensors
from difftori.solver.interface import Problem, Solver, State, all_finite, choose, choose_state, largest
from difftori.solver.objective import Objective, TrajectoryObjective, as_objective
from difftori.solver.projected_gradient import ProjectedGradient
from difftori.solver.solution import History, Solution, Status, status_with_hessian
from difftori.solver.validation import (
    check_functions,
    check_settings,
    check_start,
    check_transforms,
    check_types,
    checked_box,
)
from difftori.types import Points, RowCounts, RowFlags, Rows


def solve(
    objective: Objective | Callable[[Tensor], Tensor],
    x0: Points,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    box: Box | None = None,
    project_start: bool = False,
    max_steps: int = 100,
    tolerance: float | None = None,
    keep: Literal["best", "last"] = "best",
    candidates: Tensor | None = None,
    generator: torch.Generator | None = None,
    history: bool = False,
    throw: bool = False,
    compile: bool = False,
    inequality: Callable[[Tensor], Tensor] | None = None,
    equality: Callable[[Tensor], Tensor] | None = None,
    augmented: AugmentedLagrangian | None = None,
    multipliers: Multipliers | None = None,
) -> Solution:
    """Minimise B independent problems from x0 (B n) within bounds and under constraints.

        x*(θ) = argmin_x J(x, θ)  subject to  low ≤ x ≤ high,  g(x, θ) ≤ 0,  h(x, θ) = 0

    Rows do not interact. NaN or Inf in one row does not change the others; `Solution.status` reports the result of each row.
    No graph is built under `torch.no_grad()` or `torch.inference_mode()`, or if nothing in the objective requires a gradient.

    Args:
        objective: an `Objective`, or a callable from x (B n) to the cost (B). Gradients of the solution flow into every
            tensor that it uses.
        x0: the start, (B n), float32 or float64, inside the box.
        solver: default: `ProjectedGradient()`.
        adjoint: how x is differentiated; default: `Implicit()`.
        box: bounds; default: none.
        project_start: start at the nearest point of the box to x0. Default: False, x0 must lie inside, which is checked.
        max_steps: the largest number of steps per row. A step of a first-order solver is one evaluation of cost and gradient.
        tolerance: a row has converged when its estimated distance to the optimum is at most this share of its length scale.
            Default: 1e-5 in float32 and 1e-9 in float64. The distance is the largest gradient coordinate without an active
            bound, divided by the curvature along the row's recent steps. The length scale is half the narrowest range (at
            most 1) or the largest |x|, whichever is larger. Where ranges differ by a factor of 8 or more, such as newtons
            beside radians, the test must also hold in units of the ranges. It does not depend on the scale of the cost.
            0.0 skips the estimate, which costs one evaluation per solve. With `project_start` and a box of numbers, a solve
            without derivative then never waits for a GPU: it takes all its steps there.
        keep: return each row's iterate of lowest cost ("best") or its last iterate ("last").
        candidates: (K B n), points that CEM and MPPI evaluate in addition to their own samples.
        generator: the random generator of CEM and MPPI.
        history: record every iterate in `Solution.history`. Not available with constraints.
        throw: raise an error if a row is not finite, instead of reporting it in the status.
        compile: run the steps through `torch.compile` (the first call with each shape takes a minute or more).
        inequality, equality: g: (B n) → (B m) and h: (B n) → (B p), differentiable. Solved in rounds of the augmented
            Lagrangian with up to `max_steps` steps each. The gradient keeps the active constraints active.
        augmented: settings of these rounds; default: `AugmentedLagrangian()`.
        multipliers: `Solution.multipliers` of a similar problem, to start from.

    Raises:
        ShapeError, BoxError, ObjectiveError, SolverError: invalid input, before any computation. On the CPU also a callable whose rows
            depend on each other, such as x / x.norm().
        NonFiniteError: a row is not finite; only with `throw`.
    """
    check_transforms()
    check_start(x0)
    solver = ProjectedGradient() if solver is None else solver
    check_types(solver, adjoint, box, max_steps, tolerance)
    objective = plain = as_objective(objective)
    if inequality is not None or equality is not None:
        objective = ConstrainedFunction(plain, inequality, equality)
    if history and isinstance(objective, Constrained):
        raise SolverError("solve: history is not available with constraints. Fix: history=False.")
    check_settings(solver, objective, x0, max_steps, tolerance, keep, compile)

    def run() -> Solution:
        bounds = checked_box(x0, box, candidates, inside=not project_start)
        check_functions(plain, x0, inequality=inequality, equality=equality)
        problem = Problem(objective, bounds, False, generator, candidates, compile)
        if not isinstance(objective, Constrained):
            return _solve(problem, solver, adjoint or Implicit(), x0, max_steps, tolerance, keep, history, throw)

        def inner(objective: Objective, x: Points, tolerance: float | Rows | None) -> Solution:
            part = replace(problem, objective=objective)
            return _solve(part, solver, Detached(), x, max_steps, tolerance, keep, False, throw)

        final = _tolerance(x0.dtype) if tolerance is None else tolerance
        wanted = (adjoint or Implicit()) if compile or _constrained_gradient(objective, x0) else Detached()
        return solve_constrained(problem, inner, wanted, x0, augmented or AugmentedLagrangian(), multipliers, final)

    try:
        return without_inference_tensors(run)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise ObjectiveError(
            f"solve: a function of the objective cannot be evaluated at several points at once (torch.func.vmap): {error} "
            "Fix: build results with torch.stack or torch.cat instead of filling a tensor, use torch.where instead of `if` and "
            "`.item()`, and draw random numbers before the solve."
        ) from error


def _solve(
    problem: Problem,
    solver: Solver,
    adjoint: Adjoint,
    x0: Points,
    max_steps: int,
    tolerance: float | Rows | None,
    keep: Literal["best", "last"],
    history: bool,
    throw: bool,
) -> Solution:
    unknown = torch.isnan(x0)
    start = problem.box.project(x0.masked_fill(unknown, 0.0))
    if not _wants_gradient(problem.objective, start, problem.compile):
        adjoint = Detached()
    run = _Run(problem, solver, start, tolerance, keep, history)
    differentiated = adjoint.apply(run.iterate, problem, max_steps)
    progress: _Progress = differentiated.iterates.progress
    status = run.status(progress, unknown.any(-1), differentiated)
    if throw and bool((status == Status.NON_FINITE).any()):
        rows = (status == Status.NON_FINITE).nonzero().squeeze(-1).tolist()
        raise NonFiniteError(
            f"solve: NaN or Inf in the cost or gradient of rows {rows[:8]} (of {len(status)}). "
            "Fix: check the data of the objective for these rows, or solve with throw=False and read Solution.status."
        )
    return Solution(
        x=differentiated.x,
        cost=progress.best_cost.detach(),
        steps=progress.steps,
        status=status,
        history=run.recorded(),
        state=progress.state.detached(),
        problem=problem,
        differentiated=differentiated,
        stationarity=None
        if progress.state.grad is None or progress.state.distance is not None
        else progress.best_norm[0].detach(),
    )


@dataclass
class _Progress:
    """The state of an iteration from step to step, per row. `best_norm`, `curvature` and `length` (K B) in each of K units. `reached`: rows that
    met the tolerance; `improved`: rows whose result is not the iterate that they began with; `resumed`: whether a part is differentiated.
    """

    x: Points
    state: State
    best_x: Points
    best_cost: Rows
    best_norm: Tensor
    done: RowFlags
    reached: RowFlags
    sound: RowFlags
    steps: RowCounts
    curvature: Tensor
    length: Tensor
    improved: RowFlags
    best_states: Tensor | None = None
    resumed: bool = False


def _improves(cost: Rows, norm: Rows, progress: _Progress) -> RowFlags:
    """A lower cost or, if rounding hides the difference, a smaller projected gradient."""
    best = progress.best_cost.detach()
    noise = 8 * torch.finfo(cost.dtype).eps * best.abs()
    return (cost < best - noise) | ((cost <= best + noise) & (norm <= progress.best_norm[0]))


class _Run:
    """The iteration of one call, which the adjoint runs through `iterate`."""

    def __init__(
        self, problem: Problem, solver: Solver, x0: Points, tolerance: float | Rows | None, keep: str, history: bool
    ):
        self.problem, self.solver, self.x0 = problem, solver, x0
        self.test = Convergence(problem, x0, _tolerance(x0.dtype) if tolerance is None else tolerance)
        self.stops = self.test.stops
        self.keep = "last" if solver.monotone and not self.stops else keep
        self.compares = self.keep == "best" or self.stops  # whether an iterate's norm is used before the end
        self.history: list[tuple[Tensor, Tensor]] | None = [] if history else None

    def iterate(
        self, steps: int, differentiable: bool, progress: _Progress | None = None, *, finish: bool = True
    ) -> Iterates:
        """Run `steps` more steps, with or without a graph, and the solver's final refinement."""
        with torch.set_grad_enabled(differentiable):
            problem = self.problem.with_graph() if differentiable else self.problem
            contraction = Contraction(problem.box) if differentiable and self.stops else None
            if fresh := progress is None:
                progress = self._begin(problem)
            elif differentiable:
                progress = self._resume(problem, progress)
            if contraction is not None and progress.state.grad is not None and progress.state.grad.requires_grad:
                x = contraction.begin(progress.x, progress.state.grad, progress.sound)
                state = self.solver.init(problem, x) if fresh else self._state(problem, x, progress.state)
                progress = replace(progress, x=x, state=state, best_x=x, best_cost=state.cost, best_states=state.states)
            # A generator cannot be traced: steps that sample from one run eagerly, and only their evaluations are compiled.
            if problem.compile and self.solver.traced_whole and self.history is None and problem.generator is None:
                self._compiled(problem, progress, steps)
            else:
                for _ in range(steps):
                    if self.stops and not bool(self._working(progress).any()):
                        break
                    self._advance(progress, *self.solver.step(problem, progress.x, progress.state))
                    if contraction is not None:
                        contraction.watch(progress.x)
            if finish:
                x, state = self.solver.finish(problem, progress.x, progress.state)
                if state is not progress.state:
                    self._advance(progress, x, state, counts=False, past_done=True)
        x = progress.best_x if self.keep == "best" else progress.x
        if self.keep == "last":
            progress.best_x, progress.best_cost = progress.x, progress.state.cost
            progress.best_norm = self.test.norm(progress.x, progress.state)
            progress.best_states = progress.state.states
        usable = all_finite(progress.best_cost.detach(), x.detach())
        if not differentiable:
            return Iterates(x, usable, progress, progress.best_states)
        if contraction is not None:
            x = contraction.end(x, progress)
        return Iterates(x, usable, progress, contraction=contraction)

    def recorded(self) -> History | None:
        """The iterates so far, if `history` is set."""
        if self.history is None:
            return None
        return History(torch.stack([x for x, _ in self.history]), torch.stack([cost for _, cost in self.history]))

    def _begin(self, problem: Problem) -> _Progress:
        x = self.x0 if problem.create_graph else self.x0.detach()
        state = self.solver.init(problem, x)
        norm = self._norm(x, state)
        sound = state.finite()
        length = self.test.length(x.detach(), state)
        curvature = self.test.first_curvature(x.detach(), state, norm, length)
        self._record(x, state.cost)
        steps = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        none = torch.zeros_like(sound)
        done = self.test.close(norm, curvature, length) if self.stops else none
        return _Progress(x, state, x, state.cost, norm, done, done, sound, steps, curvature, length, none, state.states)

    def _resume(self, problem: Problem, progress: _Progress) -> _Progress:
        """Resume at the same point with a graph. The state is evaluated again, and converged rows resume their steps, because a
        row that does not move has no derivative.
        """
        x = progress.x.detach()
        state = self._state(problem, x, progress.state)
        # The best iterate so far has no graph. Restart the comparison, so that iterates of the tail can become the best.
        norm = self._norm(x, state)
        best = {"best_x": x, "best_cost": state.cost, "best_norm": norm, "best_states": state.states}
        return replace(progress, x=x, state=state, **best, improved=torch.zeros_like(progress.done), resumed=True)

    def _state(self, problem: Problem, x: Points, state: State) -> State:
        """The state at x with a graph, and the memory of `state` without one."""
        if state.states is not None:
            return self.solver.init(problem, x)
        cost, grad = (state.cost, None) if state.grad is None else problem.evaluate(x)
        return State(cost, grad, tuple(part.detach() for part in state.memory))

    def _advance(
        self, progress: _Progress, x: Points, state: State, counts: bool = True, past_done: bool = False
    ) -> None:
        """Apply the result of a step to the unfinished rows, and record the best iterate."""
        working = moved = better = progress.sound if past_done else self._working(progress)
        if not self.solver.monotone:
            finite = state.finite()
            moved = better = working & finite
            progress.sound = moved if working is progress.sound else progress.sound & (finite | ~working)
        if self.stops:
            self._learn_curvature(progress, x.detach(), state, moved)
        if reading_is_free(x.device) and bool(moved.all()):
            progress.x, progress.state = x, state
        else:
            progress.x = choose(moved, x, progress.x)
            progress.state = choose_state(moved, state, progress.state)
        if self.compares:
            norm = self.test.norm(progress.x, progress.state)
        if self.keep == "best":
            better = moved & _improves(progress.state.cost.detach(), norm[0], progress)
            progress.best_x = choose(better, progress.x, progress.best_x)
            progress.best_cost = torch.where(better, progress.state.cost, progress.best_cost)
            progress.best_norm = torch.where(better, norm, progress.best_norm)
            if progress.best_states is not None and progress.state.states is not None:
                progress.best_states = choose(better, progress.state.states, progress.best_states)
        if self.stops:
            progress.improved = progress.improved | better
            close = self.test.close(norm, progress.curvature, progress.length)
            progress.done, progress.reached = progress.done | close, progress.reached | close
        if counts:
            progress.steps = progress.steps + working
        self._record(progress.x, progress.state.cost)

    def _norm(self, x: Points, state: State) -> Tensor:
        """The distance of an iterate from a first-order point, (K B); infinity if nothing depends on it before the end."""
        if self.compares:
            return self.test.norm(x, state)
        return torch.full_like(state.cost.detach(), torch.inf).unsqueeze(0)

    def _compiled(self, problem: Problem, progress: _Progress, steps: int) -> None:
        """Run all steps in compiled chunks of a fixed length. Only the ends of chunks are checked."""
        taken = 0
        while taken < steps and bool(self._working(progress).any()):
            chunk = min(_CHUNK, steps - taken)
            x, state = compiled_call(_steps, self.solver, problem, progress.x, progress.state, chunk)
            working = self._working(progress)
            self._advance(progress, x, state, counts=False)
            progress.steps = progress.steps + chunk * working
            taken += chunk

    def _working(self, progress: _Progress) -> RowFlags:
        """Which rows take further steps. Without a tolerance, and in a tail that is differentiated, only a failure ends a row."""
        return progress.sound if not self.stops or progress.resumed else progress.sound & ~progress.done

    def _learn_curvature(self, progress: _Progress, x: Points, state: State, moved: RowFlags) -> None:
        """Update the curvature and the length with the step about to be taken."""
        if state.grad is None or progress.state.grad is None or state.distance is not None:
            return
        step, length = x - progress.x.detach(), self.test.length(x, state)
        change = state.grad.detach() - progress.state.grad.detach()
        curvature = self.test.learned(progress.curvature, step, change, length)
        progress.curvature = torch.where(moved, curvature, progress.curvature)
        progress.length = torch.where(moved, length, progress.length)
        if not state.memory:
            # Without memory, a solver that has not moved will never move.
            progress.done = progress.done | (moved & (largest(step) == 0))

    def status(self, progress: _Progress, bad_start: RowFlags, differentiated: Differentiated) -> RowCounts:
        """The status of each row."""
        x = progress.best_x.detach()
        converged = self.test.close(progress.best_norm, progress.curvature, self.test.length(x, progress.state))
        status = torch.where(converged | progress.reached, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = status_with_hessian(status, differentiated, self.test.lengths, x)
        sound = progress.sound & differentiated.iterates.usable & ~bad_start
        return torch.where(sound, status, int(Status.NON_FINITE))

    def _record(self, x: Points, cost: Rows) -> None:
        if self.history is not None:
            self.history.append((x.detach(), cost.detach()))


def _tolerance(dtype: torch.dtype) -> float:
    """The default tolerance."""
    return 1e-9 if dtype == torch.float64 else 1e-5


_CHUNK = 5


def _steps(solver: Solver, problem: Problem, x: Tensor, state: State, count: int):
    for _ in range(count):
        x, state = solver.step(problem, x, state)
    return x, state


def _constrained_gradient(objective: Constrained, x0: Points) -> bool:
    """Whether cost or constraints use any tensor that requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    point = x0.detach()
    return objective.plain.cost(point).requires_grad or objective.constraints(point, None).requires_grad


def _wants_gradient(objective: Objective, start: Points, compile: bool) -> bool:
    """Whether the solution depends on any tensor that requires a gradient, by one eager evaluation of the cost if need be.

    A compiled solve skips the evaluation, because it costs time; no graph is built if none is needed.
    """
    if not torch.is_grad_enabled():
        return False
    known = (
        compile or start.requires_grad or (isinstance(objective, TrajectoryObjective) and objective.state.requires_grad)
    )
    return known or checked_cost(objective, start).requires_grad
