"""Box-constrained iLQR (differential dynamic programming) for objectives with a trajectory's structure."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver.derivatives import row_jacobian
from difftori.solver.method import Problem, Solver, State, choose
from difftori.solver.newton import factorise, improves
from difftori.solver.objective import TrajectoryObjective
from difftori.types import Points

# Riccati's names: s state, u action, F = ∂next/∂(s,u) (H B S S+A), c and C the stage cost's gradient and Hessian.


@dataclass(frozen=True)
class ILQR(Solver):
    """One backward Riccati sweep and one line-searched rollout a step, all rows at once (Tassa, Mansard and Todorov, 2014).

    Controls stay inside the box by a small quadratic programme at each time step; the feedback acts on its free set.
    All `lengths` of the line search are rolled out together and the best is taken, so the cost never rises.
    `second_order` adds the dynamics' second derivatives (DDP), which the iLQR approximation drops. `regularisation`
    is added to the control Hessian after a refused step, ×10 each time, and shrinks again after an accepted one.
    """

    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.03125, 0.0078125)
    second_order: bool = False
    regularisation: float = 1e-4
    qp_iterations: int = 8

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate; no regularisation to begin with."""
        if not isinstance(problem.objective, TrajectoryObjective):
            raise SolverError(
                f"ILQR needs known dynamics, but the objective is a {type(problem.objective).__name__}; "
                "give a TrajectoryObjective (next, stage_cost, terminal_cost), or use ProjectedGradient."
            )
        cost, grad = problem.evaluate(x)
        return State(cost, grad, (torch.zeros_like(cost.detach()),))

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One sweep back and one forth."""
        objective = problem.objective
        assert isinstance(objective, TrajectoryObjective)
        (mu,) = state.memory
        with torch.enable_grad():
            model = _quadratic_model(objective, x, self.second_order, problem.create_graph)
        feedforward, feedback = self._backward(problem, objective, x, model, mu)
        trials = self._rollouts(problem, objective, x, model.states, feedforward, feedback)
        costs = problem.score(trials)
        costs = torch.where(torch.isfinite(costs), costs, torch.finfo(costs.dtype).max)
        best = costs.detach().argmin(0)
        rows = torch.arange(x.shape[0], device=x.device)
        trial = trials[best, rows]
        cost, grad = problem.evaluate(trial)
        taken = improves(problem, x, state, trial, cost, grad)
        assert state.grad is not None
        x = choose(taken, trial, x)
        cost, grad = torch.where(taken, cost, state.cost), choose(taken, grad, state.grad)
        eased = torch.where(mu > self.regularisation, mu / 10, 0.0)
        mu = torch.where(taken, eased, (mu * 10).clamp(self.regularisation, 1e8))
        return x, State(cost, grad, (mu,))

    def _backward(
        self, problem: Problem, objective: TrajectoryObjective, x: Points, model: "_Model", mu: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Feedforward k_t (B A) and feedback K_t (B A S) for each t, first step first."""
        size = objective.state.shape[-1]
        plan, low, high = objective.plan(x), *_bounds(problem, objective, x)
        value, curvature = model.terminal_gradient, model.terminal_hessian
        feedforward, feedback = [], []
        for t in reversed(range(objective.horizon)):
            jacobian = model.jacobian[t]
            transposed = jacobian.transpose(-1, -2)
            q = model.gradient[t] + (transposed @ value.unsqueeze(-1)).squeeze(-1)
            hessian = model.hessian[t] + transposed @ curvature @ jacobian
            if self.second_order:
                hessian = hessian + torch.einsum("bi,bijk->bjk", value, model.bends[t])
            q_s, q_u = q[:, :size], q[:, size:]
            h_ss, h_us, h_uu = hessian[:, :size, :size], hessian[:, size:, :size], hessian[:, size:, size:]
            k, gain = self._control(h_uu, h_us, q_u, low[:, t] - plan[:, t], high[:, t] - plan[:, t], mu)
            gain_t = gain.transpose(-1, -2)
            value = q_s + _mv(gain_t, _mv(h_uu, k) + q_u) + _mv(h_us.transpose(-1, -2), k)
            curvature = h_ss + gain_t @ h_uu @ gain + gain_t @ h_us + h_us.transpose(-1, -2) @ gain
            curvature = 0.5 * (curvature + curvature.transpose(-1, -2))
            feedforward.insert(0, k)
            feedback.insert(0, gain)
        return feedforward, feedback

    def _control(
        self, h_uu: Tensor, h_us: Tensor, q_u: Tensor, low: Tensor, high: Tensor, mu: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Solve min ½kᵀH_uu k + q_uᵀk over low ≤ k ≤ high by projected Newton, and the feedback on its free set."""
        identity = torch.eye(h_uu.shape[-1], dtype=h_uu.dtype, device=h_uu.device)
        h_uu = h_uu + mu[:, None, None] * identity
        if h_uu.shape[-1] == 1:
            return _single_control(h_uu[:, 0], h_us, q_u, low, high)
        k = torch.zeros_like(q_u)
        factor = factorise(h_uu, torch.ones_like(q_u, dtype=torch.bool), _FLOOR)
        # Where H_uu is not convex, the programme is solved for its convex stand-in.
        h_uu = factor.cholesky @ factor.cholesky.transpose(-1, -2)
        for _ in range(self.qp_iterations):
            grad = q_u + _mv(h_uu, k)
            held = ((k <= low) & (grad > 0)) | ((k >= high) & (grad < 0))
            factor = factorise(h_uu, ~held, _FLOOR)
            moved = torch.minimum(torch.maximum(k - factor.solve(grad), low), high)
            still = bool(((moved - k).abs() <= 1e-12 + torch.finfo(k.dtype).eps * k.abs()).all())
            k = moved
            if still:
                break
        gain = -torch.cholesky_solve(h_us * factor.free.unsqueeze(-1), factor.cholesky) * factor.free.unsqueeze(-1)
        return k, gain

    def _rollouts(
        self,
        problem: Problem,
        objective: TrajectoryObjective,
        x: Points,
        states: Tensor,
        feedforward: list[Tensor],
        feedback: list[Tensor],
    ) -> Tensor:
        """Closed-loop controls for every line-search length, (K B n)."""
        plan = objective.plan(x)
        low, high = _bounds(problem, objective, x)

        def rollout(length: Tensor) -> Points:
            state, actions = objective.state, []
            for t in range(objective.horizon):
                action = plan[:, t] + length * feedforward[t] + _mv(feedback[t], state - states[t])
                action = torch.minimum(torch.maximum(action, low[:, t]), high[:, t])
                actions.append(action)
                state = objective.next(state, action)
            return torch.cat(actions, -1)

        lengths = torch.tensor(self.lengths, dtype=x.dtype, device=x.device)
        with torch.set_grad_enabled(problem.create_graph):
            return torch.func.vmap(rollout, randomness="same")(lengths)


_FLOOR = 1e-9


def _single_control(h_uu: Tensor, h_us: Tensor, q_u: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The same programme for A = 1, where it is a clamp. Negative curvature is mirrored."""
    curvature = h_uu.abs().clamp_min(torch.finfo(h_uu.dtype).eps)
    wish = -q_u / curvature
    k = torch.minimum(torch.maximum(wish, low), high)
    free = (wish > low) & (wish < high)
    return k, -h_us / curvature.unsqueeze(-1) * free.unsqueeze(-1)


class _Model(NamedTuple):
    """The quadratic model along a rollout, discounts included; time first. `bends`: ∂²next/∂(s,u)², if asked for."""

    states: Tensor
    jacobian: Tensor
    gradient: Tensor
    hessian: Tensor
    terminal_gradient: Tensor
    terminal_hessian: Tensor
    bends: Tensor


def _quadratic_model(objective: TrajectoryObjective, x: Points, second_order: bool, create_graph: bool) -> _Model:
    size, horizon = objective.state.shape[-1], objective.horizon
    plan, state, states = objective.plan(x), objective.state, []
    for t in range(horizon):
        states.append(state)
        state = objective.next(state, plan[:, t])
    pairs = torch.stack([torch.cat([s, a], -1) for s, a in zip(states, plan.unbind(1), strict=True)])
    # Each by itself: with one step the pairs are constants, while the last state depends on the dynamics' parameters.
    pairs, state = (at if create_graph and at.requires_grad else at.detach().requires_grad_() for at in (pairs, state))
    weights = objective.discount ** torch.arange(horizon + 1, dtype=x.dtype, device=x.device)
    following = torch.func.vmap(lambda pair: objective.next(pair[..., :size], pair[..., size:]))(pairs)
    jacobian = row_jacobian(following, pairs, create_graph or second_order)
    bends = jacobian.new_zeros(0)
    if second_order:
        bends = row_jacobian(jacobian.flatten(-2), pairs, create_graph).unflatten(-2, jacobian.shape[-2:])
    stage = torch.func.vmap(lambda pair: objective.stage_cost(pair[..., :size], pair[..., size:]))(pairs)
    gradient = _gradient(weights[:-1, None] * stage, pairs)
    last = _gradient(weights[-1] * objective.terminal_cost(state), state)
    model = _Model(
        torch.stack(states),
        jacobian,
        gradient,
        row_jacobian(gradient, pairs, create_graph),
        last,
        row_jacobian(last, state, create_graph),
        bends,
    )
    return model if create_graph else _Model(*(part.detach() for part in model))


def _gradient(cost: Tensor, at: Tensor) -> Tensor:
    if not cost.requires_grad:
        return torch.zeros_like(at)
    (grad,) = torch.autograd.grad(cost.sum(), at, create_graph=True, allow_unused=True)
    return torch.zeros_like(at) if grad is None else grad


def _bounds(problem: Problem, objective: TrajectoryObjective, x: Points) -> tuple[Tensor, Tensor]:
    low = torch.as_tensor(problem.box.low).to(x).expand_as(x)
    high = torch.as_tensor(problem.box.high).to(x).expand_as(x)
    return objective.plan(low), objective.plan(high)


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
