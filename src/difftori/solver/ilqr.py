"""Box-constrained iLQR (differential dynamic programming) for trajectory objectives."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver import lq
from difftori.solver.box import number_like
from difftori.solver.interface import Problem, Solver, State, choose
from difftori.solver.lengths import range_units
from difftori.solver.objective import Objective, TrajectoryObjective
from difftori.solver.rollout import roll
from difftori.solver.settings import check_settings
from difftori.types import Plans, Points, RowFlags, Rows


@dataclass(frozen=True)
class ILQR(Solver):
    """Each step is one backward Riccati sweep and one closed-loop rollout with line search, for all rows at once.

    Iterative LQR (Tassa, Mansard and Todorov, 2014, "Control-limited differential dynamic programming"). Bounds are enforced
    by a small quadratic programme at each time step. The feedback acts on the actions without an active bound.

    Args:
        lengths: the step lengths of the line search. A step takes the first one whose cost falls by at least `armijo` of the
            predicted decrease; if there is none, it takes the best one that lowers the cost. The cost therefore never rises.
        second_order: use exact curvatures near an optimum. Far from it, the model has the Hessians of the costs only, made
            convex (see `floor`), so that every step descends. After a row has taken a full step, it tries exact curvatures
            next: the second derivatives of the dynamics, weighted by the costates, are added, and nothing is raised. If the
            sweep finds this problem convex, it is used and convergence is quadratic; otherwise the row continues without
            them. False: convergence is linear. Default: True.
        hold: the first step also tries the rollout under the feedback that would hold the first state, and takes it in rows
            where it costs less than the result of the line search. This balances unstable systems that can be balanced.
            Without it, the rollout of a first guess falls over and leads to an optimum that swings around. Default: True.
        armijo: the share of the predicted decrease that a step must reach.
        damping: if no length lowers the cost, the curvature of each action is raised by this share, then by 10 times as much
            after each further failure. It decreases again after an accepted step.
        floor: eigenvalues below this multiple of the row's largest curvature are raised to it, in units of the ranges of the
            actions where these differ.

    The solution includes the states: it stores the closed-loop rollout as computed. Unstable dynamics, whose open-loop rollout
    would amplify the rounding error of an action, can therefore be solved too.
    """

    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0078125, 0.001)
    second_order: bool = True
    hold: bool = True
    armijo: float = 0.1
    damping: float = 1e-4
    floor: float = 1e-9
    traced_whole: ClassVar[bool] = False

    def __post_init__(self):
        check_settings(self, lengths="(0, inf)", armijo="[0, 1)", damping="(0, inf)", floor="[0, 1)")

    def compilable(self, objective: Objective) -> bool:
        """True for every objective: rollouts, derivatives and sweeps are compiled separately."""
        return True

    def init(self, problem: Problem, x: Points) -> State:
        """Roll out and linearise."""
        objective = _trajectory(problem)
        plan = objective.plan(x)
        gains = plan.new_zeros(*plan.shape, objective.state.shape[-1] + 1)
        if problem.compile and not problem.create_graph:
            still = objective.state[:, None].expand(-1, plan.shape[1] + 1, -1).contiguous()
            low, high = _bounds(problem, objective, x)
            states, _, cost = (
                part[0]
                for part in _candidates(problem, objective, self.lengths[:_GROUP], still, gains, plan, low, high)
            )
        else:
            with torch.set_grad_enabled(problem.create_graph):
                states = objective.rollout(x)
                cost = lq.costs(objective, states, plan)
        nothing = torch.zeros_like(cost.detach())
        begun = _Memory(states, gains, nothing, nothing, nothing, nothing, torch.ones_like(nothing))
        return self._state(problem, x, cost, begun)

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """Search along the current gains, then linearise and sweep at the result."""
        objective = _trajectory(problem)
        memory = _Memory(*state.memory)
        low, high = _bounds(problem, objective, x)
        along = (memory.states, memory.gains, objective.plan(x), low, high)
        found, plan, cost, taken, whole = self._search(problem, objective, state.cost.detach(), memory, along)
        if self.hold and not problem.create_graph and bool(memory.fresh.any()):
            held_states, held_plan, held_cost = self._held(problem, objective, memory.states, objective.plan(x))
            better = (memory.fresh > 0) & (held_cost < torch.where(taken, cost, state.cost))
            found, plan = choose(better, held_states, found), choose(better, held_plan, plan)
            cost, taken = torch.where(better, held_cost, cost), taken | better
        x = choose(taken, plan.flatten(1), x)
        cost = torch.where(taken, cost, state.cost)
        eased = torch.where(memory.damping > self.damping, memory.damping / 10, 0.0)
        memory = memory._replace(
            states=choose(taken, found, memory.states),
            damping=torch.where(taken, eased, (memory.damping * 10).clamp(self.damping, 1e8)),
            near=torch.where(taken & whole, 1.0, memory.near),
            fresh=torch.zeros_like(memory.fresh),
        )
        return x, self._state(problem, x, cost, memory)

    def feedback(self, state: State) -> Tensor:
        """The feedback gains K (B H A S) from states to actions, along the trajectory at the end of a solve."""
        return _Memory(*state.memory).gains[..., :-1]

    def corrected(
        self, objective: TrajectoryObjective, problem: Problem, actions: Plans, nominal: Tensor, feedback: Tensor
    ) -> Plans:
        """Actions (B H A) corrected by `feedback` (B H A S) for the deviation of the objective's start from `nominal` (B H+1 S)."""
        low, high = _bounds(problem, objective, actions.flatten(1))
        first = actions[:, 0] + lq.times_vector(feedback[:, 0], objective.state - nominal[:, 0])
        actions = torch.cat([first.unsqueeze(1), actions[:, 1:]], 1).clamp(low, high)
        nominal = torch.cat([objective.state.unsqueeze(1), nominal[:, 1:]], 1)
        gains = torch.cat([feedback, torch.zeros_like(feedback[..., :1])], -1)
        return _candidates(problem, objective, self.lengths[:_GROUP], nominal, gains, actions, low, high)[1][0]

    def _search(
        self, problem: Problem, objective: TrajectoryObjective, cost: Rows, memory: "_Memory", along: tuple[Tensor, ...]
    ) -> tuple[Tensor, Plans, Rows, RowFlags, RowFlags]:
        """States, actions and cost of the step length that each row takes, whether it takes one, and whether it is a full step.

        Lengths are tried in groups, all rows and lengths of a group at once, until every row has taken one.
        """
        rows = torch.arange(len(cost), device=cost.device)
        found: tuple[Tensor, Tensor, Tensor, RowFlags, RowFlags] | None = None
        for begin in range(0, len(self.lengths), _GROUP):
            lengths = self.lengths[begin : begin + _GROUP]
            states, plans, costs = _candidates(problem, objective, lengths, *along)
            chosen, taken = self._choose(cost, costs.detach(), memory, lengths)
            whole = (chosen == 0) if begin == 0 else torch.zeros_like(taken)
            these = (states[chosen, rows], plans[chosen, rows], costs[chosen, rows], taken, whole)
            if found is None:
                found = these
            else:
                waiting = ~found[3]
                a, b, c, d, e = (choose(waiting, new, old) for new, old in zip(these, found, strict=True))
                found = (a, b, c, d, e)
            if bool(found[3].all()):
                break
        assert found is not None
        return found

    def _choose(
        self, cost: Rows, costs: Tensor, memory: "_Memory", lengths: tuple[float, ...]
    ) -> tuple[Tensor, RowFlags]:
        """Which of a group's lengths each row takes, and whether it takes any."""
        alphas = torch.tensor(lengths, dtype=cost.dtype, device=cost.device)[:, None]
        costs = torch.where(torch.isfinite(costs), costs, torch.inf)
        predicted = alphas * memory.slope + 0.5 * alphas.square() * memory.bend
        enough = costs <= cost + self.armijo * predicted
        # If rounding hides the decrease, a full step is taken as long as the cost does not rise: the row is near the optimum.
        noise = _NOISE * torch.finfo(cost.dtype).eps * cost.abs()
        hidden = -(memory.slope + 0.5 * memory.bend) <= noise
        enough = enough & ~hidden
        if lengths[0] == self.lengths[0]:
            enough[0] |= hidden & (costs[0] <= cost + noise)
        best = costs.argmin(0)
        chosen = torch.where(enough.any(0), enough.to(torch.int8).argmax(0), best)
        found = costs.gather(0, chosen[None])[0]
        return chosen, enough.any(0) | (found < cost - noise)

    def _held(
        self, problem: Problem, objective: TrajectoryObjective, states: Tensor, plan: Plans
    ) -> tuple[Tensor, Plans, Rows]:
        """The rollout under the feedback that would hold the first state: states, actions and costs (infinite if undefined)."""
        low, high = _bounds(problem, objective, plan.flatten(1))
        still = states[:, :1].expand_as(states).contiguous()
        nothing = torch.zeros_like(plan[:, 0, 0])
        floor, units = max(self.floor, 8 * torch.finfo(plan.dtype).eps), range_units(problem.box, plan.flatten(1))
        model = lq.convexified(_linearised(problem, objective, still, plan), floor, units)
        gains = lq.sweep(model, low - plan, high - plan, nothing, problem.compile).gains.clone()
        gains[..., -1] = 0.0
        found, plans, costs = _candidates(problem, objective, self.lengths[:_GROUP], still, gains, plan, low, high)
        return found[0], plans[0], torch.where(torch.isfinite(costs[0]), costs[0], torch.inf)

    def _state(self, problem: Problem, x: Points, cost: Rows, memory: "_Memory") -> State:
        """Linearise along the memory's states, with its gains as the feedback, and sweep for new gains."""
        objective = _trajectory(problem)
        plan, compile = objective.plan(x), problem.compile and not problem.create_graph
        low, high = _bounds(problem, objective, x)
        bounds = (low - plan, high - plan, memory.damping, compile)
        feedback = memory.gains[..., :-1].contiguous()
        with torch.set_grad_enabled(problem.create_graph):
            model = _linearised(problem, objective, memory.states, plan)
            costate, grad = problem.call(lq.costates, model, feedback)
            floor, units = max(self.floor, 8 * torch.finfo(x.dtype).eps), range_units(problem.box, x)
            near = memory.near > 0 if self.second_order else torch.zeros_like(memory.near, dtype=torch.bool)
            if bool(near.any()):
                curved = lambda s, a: problem.call(lq.with_dynamics_curvature, objective, s, a, model, costate)  # noqa: E731
                exact = lq.defined(curved, memory.states, plan).model
                every = bool(near.all())
                swept = lq.sweep(exact if every else _mixed(near, exact, lq.convexified(model, floor, units)), *bounds)
                sound = ~near | (swept.convex & (swept.slope <= 0))
                memory = memory._replace(near=torch.where(sound, memory.near, 0.0))
                if not bool(sound.all()):
                    swept = lq.sweep(_mixed(near & sound, exact, lq.convexified(model, floor, units)), *bounds)
            else:
                swept = lq.sweep(lq.convexified(model, floor, units), *bounds)
        memory = memory._replace(
            gains=swept.gains, slope=swept.slope.detach(), bend=swept.bend.detach(), damping=memory.damping
        )
        return State(cost, grad.flatten(1), tuple(memory), memory.states, swept.newton.detach().flatten(1))


def _linearised(problem: Problem, objective: TrajectoryObjective, states: Tensor, plan: Plans) -> lq.LQModel:
    return lq.defined(lambda s, a: problem.call(lq.linearise, objective, s, a), states, plan).model


def _mixed(rows: RowFlags, yes: lq.LQModel, no: lq.LQModel) -> lq.LQModel:
    return lq.LQModel(*(choose(rows, a, b) for a, b in zip(yes, no, strict=True)))


class _Memory(NamedTuple):
    """Rows first: the trajectory that belongs to x, the gains [K k] along it, the slope and bend of the model along them, the
    damping, whether the row has taken a full step since exact curvatures last failed, and whether it has taken no step yet
    (1 or 0).
    """

    states: Tensor
    gains: Tensor
    slope: Rows
    bend: Rows
    damping: Rows
    near: Rows
    fresh: Rows


_NOISE = 64.0
_GROUP = 4
"""Number of step lengths that are rolled out together."""


def _candidates(
    problem: Problem,
    objective: TrajectoryObjective,
    lengths: tuple[float, ...],
    states: Tensor,
    gains: Tensor,
    plan: Plans,
    low: Plans,
    high: Plans,
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-loop rollouts of every step length: states (L B H+1 S), actions (L B H A), costs (L B)."""
    alphas = torch.tensor(lengths, dtype=plan.dtype, device=plan.device)
    compile = problem.compile and not problem.create_graph
    with torch.set_grad_enabled(problem.create_graph):
        return roll(objective, states, plan, gains, low, high, alphas, compile)


def _trajectory(problem: Problem) -> TrajectoryObjective:
    objective = problem.objective
    if not isinstance(objective, TrajectoryObjective) or not objective.staged:
        raise SolverError(
            f"ILQR needs dynamics and a cost for each step, but the objective is a {type(objective).__name__}. "
            "Fix: use a TrajectoryObjective (next, stage_cost, terminal_cost), or ProjectedGradient()."
        )
    return objective


def _bounds(problem: Problem, objective: TrajectoryObjective, x: Points) -> tuple[Tensor, Tensor]:
    low = number_like(problem.box.low, x).expand_as(x)
    high = number_like(problem.box.high, x).expand_as(x)
    return objective.plan(low), objective.plan(high)
