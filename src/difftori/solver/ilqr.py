"""Box-constrained iLQR (differential dynamic programming) for objectives with a trajectory's structure."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from difftori.errors import SolverError
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

    Far from an optimum the model has the costs' Hessians alone, made convex (eigenvalues below `floor` × the row's largest
    curvature are raised to it), so that a step always descends. With `second_order`, a row that has taken a whole step tries
    exact curvatures next: the dynamics' second derivatives are added, weighted by the costates, and nothing is raised. If the
    sweep finds that problem convex it is used, so that convergence is quadratic; if not, the row goes on as before.
    Without, convergence is linear.

    A step takes the first of `lengths` whose cost falls by at least `armijo` of what the model predicts, and otherwise the best
    one if it falls at all, so the cost never rises. After a step of which no length lowers the cost, the curvature of each
    action is raised by a share: `damping` first, ×10 each time, and less again after an accepted step.

    The states belong to the solution: the closed-loop rollout is kept as it was computed, so that unstable dynamics, whose
    open-loop rollout would amplify the last bit of an action, are solved too.
    """

    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0078125, 0.001)
    second_order: bool = True
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
            cost = lq.costs(objective, states, plan)
        nothing = torch.zeros_like(cost.detach())
        gains = plan.new_zeros(*plan.shape, states.shape[-1] + 1)
        begun = _Memory(states, gains, nothing, nothing, nothing, nothing)
        return self._state(problem, x, cost, begun)

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One line search along the gains at hand, then linearise and sweep where it ended."""
        objective = _trajectory(problem)
        memory = _Memory(*state.memory)
        low, high = _bounds(problem, objective, x)
        states, plans, costs = _candidates(problem, objective, self.lengths, memory, objective.plan(x), low, high)
        chosen, taken = self._choose(state.cost.detach(), costs.detach(), memory)
        rows = torch.arange(x.shape[0], device=x.device)
        x = choose(taken, plans[chosen, rows].flatten(1), x)
        cost = torch.where(taken, costs[chosen, rows], state.cost)
        near = taken & (chosen == 0)
        eased = torch.where(memory.damping > self.damping, memory.damping / 10, 0.0)
        memory = memory._replace(
            states=choose(taken, states[chosen, rows], memory.states),
            damping=torch.where(taken, eased, (memory.damping * 10).clamp(self.damping, 1e8)),
            near=torch.where(near, 1.0, memory.near),
        )
        return x, self._state(problem, x, cost, memory)

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

    def _state(self, problem: Problem, x: Points, cost: Rows, memory: "_Memory") -> State:
        """Linearise along the memory's states, with its gains as the feedback, and sweep for new ones."""
        objective = _trajectory(problem)
        plan, compile = objective.plan(x), problem.compile and not problem.create_graph
        low, high = _bounds(problem, objective, x)
        bounds = (low - plan, high - plan, memory.damping, compile)
        feedback = memory.gains[..., :-1].contiguous()
        with torch.set_grad_enabled(problem.create_graph):
            model, costate, grad = _call(problem, lq.first_order, objective, memory.states, plan, feedback)
            convex = lq.convexified(model, max(self.floor, 8 * torch.finfo(x.dtype).eps))
            near = memory.near > 0
            if self.second_order and bool(near.any()):
                exact = _call(problem, lq.with_dynamics_curvature, objective, memory.states, plan, model, costate)
                swept = lq.sweep(_mixed(near, exact, convex), *bounds)
                sound = swept.convex & (swept.slope <= 0)
                if bool((near & ~sound).any()):
                    memory = memory._replace(near=torch.where(sound, memory.near, 0.0))
                    swept = lq.sweep(_mixed(near & sound, exact, convex), *bounds)
            else:
                swept = lq.sweep(convex, *bounds)
        memory = memory._replace(
            gains=swept.gains, slope=swept.slope.detach(), bend=swept.bend.detach(), damping=memory.damping
        )
        return State(cost, grad.flatten(1), tuple(memory), memory.states, swept.newton.detach())


def _mixed(rows: RowFlags, yes: lq.LQModel, no: lq.LQModel) -> lq.LQModel:
    return lq.LQModel(*(choose(rows, a, b) for a, b in zip(yes, no, strict=True)))


class _Memory(NamedTuple):
    """Rows first: the trajectory that belongs to x, the gains [K k] along it, the model's slope and bend along them, the
    damping, and whether the row has taken a whole step since exact curvatures last failed it (1 or 0).
    """

    states: Tensor
    gains: Tensor
    slope: Rows
    bend: Rows
    damping: Rows
    near: Rows


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


def _bounds(problem: Problem, objective: TrajectoryObjective, x: Points) -> tuple[Tensor, Tensor]:
    low = torch.as_tensor(problem.box.low).to(x).expand_as(x)
    high = torch.as_tensor(problem.box.high).to(x).expand_as(x)
    return objective.plan(low), objective.plan(high)
