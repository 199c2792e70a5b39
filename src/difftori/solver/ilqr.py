"""Box-constrained iLQR (differential dynamic programming) for objectives with a trajectory's structure."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from difftori.errors import ShapeError, SolverError
from difftori.solver import lq
from difftori.solver.compiled import compiled_call
from difftori.solver.method import Problem, Solver, State, choose
from difftori.solver.objective import Objective, TrajectoryObjective
from difftori.types import Plans, Points, RowFlags, Rows


@dataclass(frozen=True)
class ILQR(Solver):
    """One backward Riccati sweep and one line-searched closed-loop rollout a step, all rows at once.

    Iterative LQR (Tassa, Mansard and Todorov, 2014, "Control-limited differential dynamic programming"). Bounds are kept by
    a small quadratic programme at each time step; the feedback acts on the actions that no bound holds.

    The Hessians of the costs are made convex (eigenvalues below `floor` × the row's largest curvature are raised to
    it), so that a step always descends. A step takes the first of `lengths` whose cost falls by at least `armijo` of what the
    model predicts, and otherwise the best one if it falls at all, so the cost never rises. After a step of which no length
    lowers the cost, the curvature of each action is raised by a share: `damping` first, ×10 each time, and less again after
    an accepted step. `second_order` adds the dynamics' second derivatives (DDP), weighted by the costate.

    The states belong to the solution: the closed-loop rollout is kept as it was computed, so that unstable dynamics, whose
    open-loop rollout would amplify the last bit of an action, are solved too.
    """

    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0078125, 0.001)
    second_order: bool = False
    armijo: float = 0.1
    damping: float = 1e-4
    floor: float = 1e-9
    traced_whole: ClassVar[bool] = False

    def compilable(self, objective: Objective) -> bool:
        """Rollouts, derivatives and sweeps are compiled, each by itself."""
        return True

    def init(self, problem: Problem, x: Points) -> State:
        """Roll out and linearise."""
        objective = _trajectory(problem)
        plan = objective.plan(x)
        with torch.set_grad_enabled(problem.create_graph):
            states = objective.rollout(x)
        _check_shapes(objective, states)
        with torch.set_grad_enabled(problem.create_graph):
            cost = lq.costs(objective, states, plan)
        feedback = plan.new_zeros(*plan.shape, states.shape[-1])
        return self._state(problem, x, cost, states, feedback, torch.zeros_like(cost.detach()))

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One line search along the gains at hand, then linearise and sweep where it ended."""
        objective = _trajectory(problem)
        memory = _Memory(*state.memory)
        low, high = _bounds(problem, objective, x)
        states, plans, costs = _candidates(problem, objective, self.lengths, memory, objective.plan(x), low, high)
        chosen, taken = self._choose(state.cost.detach(), costs.detach(), memory)
        rows = torch.arange(x.shape[0], device=x.device)
        x = choose(taken, plans[chosen, rows].flatten(1), x)
        following = choose(taken, states[chosen, rows], memory.states)
        cost = torch.where(taken, costs[chosen, rows], state.cost)
        eased = torch.where(memory.damping > self.damping, memory.damping / 10, 0.0)
        damping = torch.where(taken, eased, (memory.damping * 10).clamp(self.damping, 1e8))
        return x, self._state(problem, x, cost, following, memory.gains[..., :-1].contiguous(), damping)

    def feedback(self, state: State) -> Tensor:
        """The feedback K (B H A S) of actions to states, along the trajectory at which a solve ended."""
        return _Memory(*state.memory).gains[..., :-1]

    def _choose(self, cost: Rows, costs: Tensor, memory: "_Memory") -> tuple[Tensor, RowFlags]:
        """Which length each row takes, and whether it takes any."""
        lengths = torch.tensor(self.lengths, dtype=cost.dtype, device=cost.device)[:, None]
        costs = torch.where(torch.isfinite(costs), costs, torch.inf)
        predicted = lengths * memory.slope + 0.5 * lengths.square() * memory.bend
        enough = costs <= cost + self.armijo * predicted
        # Where rounding hides the decrease, a whole step is taken as long as nothing is lost: it is near the optimum.
        noise = _NOISE * torch.finfo(cost.dtype).eps * cost.abs()
        hidden = -(memory.slope + 0.5 * memory.bend) <= noise
        enough = enough & ~hidden
        enough[0] |= hidden & (costs[0] <= cost + noise)
        best = costs.argmin(0)
        chosen = torch.where(enough.any(0), enough.to(torch.int8).argmax(0), best)
        found = costs.gather(0, chosen[None])[0]
        return chosen, enough.any(0) | (found < cost - noise)

    def _state(
        self, problem: Problem, x: Points, cost: Rows, states: Tensor, feedback: Tensor, damping: Rows
    ) -> State:
        objective = _trajectory(problem)
        plan = objective.plan(x)
        low, high = _bounds(problem, objective, x)
        with torch.set_grad_enabled(problem.create_graph):
            model, costate, grad = _call(problem, lq.first_order, objective, states, plan, feedback)
            if self.second_order:
                model = _call(problem, lq.with_dynamics_curvature, objective, states, plan, model, costate)
            swept = lq.sweep(
                lq.convexified(model, self.floor),
                low - plan,
                high - plan,
                damping,
                problem.compile and not problem.create_graph,
            )
        slope, bend, newton = swept.slope.detach(), swept.bend.detach(), swept.newton.detach()
        memory = _Memory(states, swept.gains, slope, bend, newton, damping)
        return State(cost, grad.flatten(1), tuple(memory), states, newton)


class _Memory(NamedTuple):
    """Rows first: the trajectory that belongs to x, the gains along it, the model's slope and bend along them, the damping."""

    states: Tensor
    gains: Tensor
    slope: Rows
    bend: Rows
    newton: Rows
    damping: Rows


_NOISE = 64.0


def _candidates(
    problem: Problem,
    objective: TrajectoryObjective,
    lengths: tuple[float, ...],
    memory: _Memory,
    plan: Plans,
    low: Plans,
    high: Plans,
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-loop rollouts of every length: states (L B H+1 S), actions (L B H A), costs (L B)."""
    alphas = torch.tensor(lengths, dtype=plan.dtype, device=plan.device)
    compile = problem.compile and not problem.create_graph
    with torch.set_grad_enabled(problem.create_graph):
        return lq.roll(objective, memory.states, plan, memory.gains, low, high, alphas, compile)


def _call(problem: Problem, function, *arguments):
    if problem.compile and not problem.create_graph:
        lean = arguments[1].device.type == "cpu"
        return compiled_call(function, *arguments, lean=lean)
    with torch.set_grad_enabled(problem.create_graph):
        return function(*arguments)


def _trajectory(problem: Problem) -> TrajectoryObjective:
    objective = problem.objective
    if not isinstance(objective, TrajectoryObjective) or not objective.staged:
        raise SolverError(
            f"ILQR needs known dynamics and a cost for each step, but the objective is a {type(objective).__name__}; "
            "give a TrajectoryObjective (next, stage_cost, terminal_cost), or use ProjectedGradient."
        )
    return objective


def _check_shapes(objective: TrajectoryObjective, states: Tensor) -> None:
    del objective, states


def _bounds(problem: Problem, objective: TrajectoryObjective, x: Points) -> tuple[Tensor, Tensor]:
    low = torch.as_tensor(problem.box.low).to(x).expand_as(x)
    high = torch.as_tensor(problem.box.high).to(x).expand_as(x)
    return objective.plan(low), objective.plan(high)
