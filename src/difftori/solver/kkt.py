"""The derivative of an optimal trajectory by one additional Riccati sweep, which solves the optimality conditions in O(H).

At an optimum the states s, the actions a and the costates λ satisfy, with L = J + Σ λ_{t+1}ᵀ(next(s_t, a_t) − s_{t+1}),

        ∂L/∂s = 0,    ∂L/∂a = 0 for actions without an active bound,    next(s_t, a_t) − s_{t+1} = 0,    s_0 = start.

With R these residuals and K their (symmetric) matrix of derivatives, d(s, a, λ)/dθ = −K⁻¹ ∂R/∂θ. A vector-Jacobian product
is one solve with K, which is one linear-quadratic problem with the exact Hessians of L, including the second derivatives of
the dynamics. No step amplifies the errors of the others, so unstable dynamics over long horizons are differentiated to full
precision. The dense Hessian of J with respect to the actions has a condition number that grows exponentially with the horizon.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from difftori.solver import lq
from difftori.solver.box import number_like
from difftori.solver.compiled import loop
from difftori.solver.constraints import STIFFER, ConstrainedTrajectory, keep_active
from difftori.solver.interface import Problem, choose
from difftori.solver.lengths import range_units
from difftori.solver.objective import TrajectoryObjective
from difftori.types import PlanFlags, Plans, Points, RowFlags


class TrajectoryDerivative(NamedTuple):
    """`actions` (B n) and `states` (B H+1 S) with their derivative; `convex`, `singular` (B) and `newton_step` (B n) as in
    `Differentiated`.
    """

    actions: Points
    states: Tensor
    convex: RowFlags
    singular: RowFlags
    newton_step: Points


def differentiate(
    problem: Problem, x: Points, states: Tensor, first_order_only: Callable[[Tensor], Tensor]
) -> TrajectoryDerivative:
    """Attach the derivative of the optimum to actions x (B n) and states (B H+1 S), both without a graph."""
    objective = problem.objective
    assert isinstance(objective, TrajectoryObjective)
    plan = objective.plan(x)
    with torch.no_grad():
        low, high = (objective.plan(number_like(b, x).expand_as(x)) for b in (problem.box.low, problem.box.high))
        inside = (plan > low) & (plan < high)
        model, costate, grad, points = _exact(problem, objective, states, plan, inside)
        free = (~problem.box.held(x, grad.flatten(1))).view_as(plan)
        active = None
        if isinstance(objective, ConstrainedTrajectory):
            active = _active(objective, x, states)
            model = active.stiffened(model)
        factor = factorise(model, free)
        if not bool(factor.convex.all()):
            # Not a minimum: the gradient is bounded by using the convex model of a solver step.
            raised = lq.convexified(model, _RAISED, range_units(problem.box, x))
            model = lq.LQModel(*(choose(factor.convex, own, other) for own, other in zip(model, raised, strict=True)))
            again = factorise(model, free)
            factor = again._replace(convex=factor.convex, singular=factor.singular)
        move, _, _ = factor.solve(torch.zeros_like(states), grad * free)
    lagrangian, values = objective, plan.new_zeros(0)
    if active is not None:
        assert isinstance(objective, ConstrainedTrajectory)
        lagrangian, values = objective.lagrangian(active.multipliers), objective.constraints(x, states)
    residuals = problem.call(residual, lagrangian, *points, costate)
    residuals = (*residuals, objective.state, values)
    if not any(part.requires_grad for part in residuals):
        return TrajectoryDerivative(x, states, factor.convex, factor.singular, move.flatten(1))
    residuals = tuple(first_order_only(part) if part.requires_grad else part for part in residuals)
    actions, states = _Optimum.apply(plan, states, factor, active, *residuals)
    return TrajectoryDerivative(actions.flatten(1), states, factor.convex, factor.singular, move.flatten(1))


_RAISED = 1e-4


def _exact(
    problem: Problem, objective: TrajectoryObjective, states: Tensor, plan: Plans, inside: PlanFlags
) -> tuple[lq.LQModel, Tensor, Plans, tuple[Tensor, Plans]]:
    """The exact second-order model of L, the costates, the gradient with respect to the actions, and the states and actions at which
    all second derivatives are defined.
    """
    model, *points = lq.defined(lambda s, a: problem.call(lq.linearise, objective, s, a), states, plan)
    # The costates need some stabilising feedback (see lq.costates). This one uses the curvature of the costs only.
    units = range_units(problem.box, plan.flatten(1))
    feedback = factorise(lq.convexified(model, _FLOOR, units), inside).gain
    costate, grad = lq.costates(model, feedback)
    exact, *points = lq.defined(
        lambda s, a: problem.call(lq.with_dynamics_curvature, objective, s, a, model, costate), *points
    )
    # A row with NaN or infinity has no derivative. Zeros keep it out of the gradients of the other rows' parameters.
    finite = torch.stack([torch.isfinite(part).flatten(1).all(-1) for part in (*exact, costate, grad)]).all(0)
    if not bool(finite.all()):
        exact = lq.LQModel(*(choose(finite, part, torch.zeros_like(part)) for part in exact))
        costate, grad = (choose(finite, part, torch.zeros_like(part)) for part in (costate, grad))
    return exact, costate, grad, (points[0], points[1])


_FLOOR = 1e-9


def residual(
    objective: TrajectoryObjective, states: Tensor, plan: Plans, costate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂(s, a) of each step (B H N), ∂L/∂s_H (B S) and the next states (B H S) at a fixed point. Differentiable in θ."""
    size = states.shape[-1]
    weights = lq.discounts(objective, states)

    def at(state: Tensor, action: Tensor, t: Tensor, weight: Tensor, costate: Tensor) -> tuple[Tensor, Tensor]:
        def lagrangian(pair: Tensor) -> tuple[Tensor, Tensor]:
            s, a = pair[..., :size], pair[..., size:]
            following = objective.next(s, a, t)
            total = weight * objective.stage_cost(s, a, t) + (following * costate).sum(-1)
            return total.sum(), following

        gradient, following = torch.func.grad(lagrangian, has_aux=True)(torch.cat([state, action], -1))
        return gradient, following

    stage, following = vmap(at, in_dims=(1, 1, 0, 0, 1), randomness="same")(
        states[:, :-1], plan, objective.times(), weights[:-1], costate[:, 1:]
    )
    last = torch.func.grad(lambda s: (weights[-1] * objective.terminal_cost(s)).sum())(states[:, -1])
    # vmap returns the time first, because it cannot place it elsewhere if nothing depends on the time.
    return stage.movedim(0, 1), last, following.movedim(0, 1)


class Factor(NamedTuple):
    """K, factorised by a backward sweep. Rows first, then time.

    `jacobian` F (B H S N); `free` (B H A); `cholesky` (B H A A) of the actions' curvature on the free set; `gain` K (B H A S);
    `value` V (B H+1 S S). `convex` (B): every curvature is positive definite to working precision, so the point is a strict minimum.
    `singular` (B): at least one of them is singular to working precision, and none is negative.
    """

    jacobian: Tensor
    free: PlanFlags
    cholesky: Tensor
    gain: Tensor
    value: Tensor
    convex: RowFlags
    singular: RowFlags

    def solve(self, v_states: Tensor, v_actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K⁻¹(v_s, v_a, 0): for actions (B H A), states (B H+1 S) and the constraints of the dynamics (B H+1 S)."""
        size = v_states.shape[-1]
        transposed = self.jacobian.transpose(-1, -2)

        def back(carry: tuple[Tensor], step: tuple[Tensor, ...]) -> tuple[tuple[Tensor], tuple[Tensor, Tensor]]:
            (p,), (ft, v_s, v_a, factor, gain, free) = carry, step
            q = lq.times_vector(ft, p)
            q_s, q_a = q[:, :size] - v_s, (q[:, size:] - v_a) * free
            k = -torch.cholesky_solve(q_a.unsqueeze(-1), factor).squeeze(-1) * free
            p = q_s + lq.times_vector(gain.transpose(-1, -2), q_a)
            return (p,), (k, p)

        steps = (transposed, v_states[:, :-1], v_actions, self.cholesky, self.gain, self.free)
        last = -v_states[:, -1]
        _, (k, p) = loop(back, (last,), tuple(part.movedim(1, 0).flip(0) for part in steps))

        def forth(carry: tuple[Tensor], step: tuple[Tensor, ...]) -> tuple[tuple[Tensor], tuple[Tensor, Tensor]]:
            (w,), (f, k, gain) = carry, step
            action = k + lq.times_vector(gain, w)
            return (lq.times_vector(f, torch.cat([w, action], -1)),), (w, action)

        steps = (self.jacobian.movedim(1, 0), k.flip(0), self.gain.movedim(1, 0))
        (end,), (w, actions) = loop(forth, (torch.zeros_like(last),), steps)
        states = torch.cat([w, end.unsqueeze(0)]).movedim(0, 1)
        linear = torch.cat([p.flip(0), last.unsqueeze(0)]).movedim(0, 1)
        return actions.movedim(0, 1), states, lq.times_vector(self.value, states) + linear


def factorise(model: lq.LQModel, free: PlanFlags) -> Factor:
    """Sweep backward through the model, on the actions marked in `free` (B H A)."""
    size, eps = model.terminal_gradient.shape[-1], torch.finfo(model.hessian.dtype).eps
    identity = torch.eye(free.shape[-1], dtype=model.hessian.dtype, device=free.device)

    def back(carry: tuple[Tensor], step: tuple[Tensor, ...]) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
        (value,), (f, hessian, free) = carry, step
        q = hessian + f.transpose(-1, -2) @ value @ f
        both = free.unsqueeze(-1) & free.unsqueeze(-2)
        h = torch.where(both, q[:, size:, size:], identity)
        factor, failed = torch.linalg.cholesky_ex(h)
        pivot = factor.diagonal(dim1=-1, dim2=-2).square() / h.diagonal(dim1=-1, dim2=-2)
        sound = (failed == 0) & torch.isfinite(factor).flatten(1).all(-1)
        factor = torch.where(sound[:, None, None], factor, identity)
        gain = -torch.cholesky_solve(q[:, size:, :size] * free.unsqueeze(-1), factor) * free.unsqueeze(-1)
        value = q[:, :size, :size] + q[:, :size, size:] @ gain
        value = 0.5 * (value + value.transpose(-1, -2))
        largest = torch.where(both, h, 0.0).abs().amax((1, 2))
        return (value,), (value, factor, gain, sound, torch.where(sound, pivot.amin(-1), 0.0), h, largest)

    steps = (model.jacobian, model.hessian, free)
    _, found = loop(back, (model.terminal_hessian,), tuple(part.movedim(1, 0).flip(0) for part in steps))
    value, cholesky, gain, sound, pivot, h, largest = (part.flip(0).movedim(0, 1) for part in found)
    value = torch.cat([value, model.terminal_hessian.unsqueeze(1)], 1)
    near = 1e3 * eps
    singular = pivot.amin(-1) < near
    if not bool(sound.all()):
        singular = singular & (sound | _zero(h, ~sound, near * largest.amax(-1, keepdim=True))).all(-1)
    return Factor(model.jacobian, free, cholesky, gain, value, sound.all(-1) & ~singular, singular)


def _zero(h: Tensor, failed: Tensor, rounding: Tensor) -> Tensor:
    """Which of the curvatures h (B H A A) that could not be factorised, `failed` (B H), are zero and not negative up to `rounding` (B 1)."""
    blocks = h[failed]
    finite = torch.isfinite(blocks).flatten(1).all(-1)
    least = torch.linalg.eigvalsh(torch.where(finite[:, None, None], blocks, 0.0)).amin(-1)
    return failed.masked_scatter(failed, finite & (least >= -rounding.expand_as(failed)[failed]))


class _Active(NamedTuple):
    """The active constraints at the solution.

    Derivatives of the stage constraints (B H m N) and of those on the last state (B k S), zero for inactive constraints; their
    `multipliers` (B H·m+k), also zero there; what is added to their weights in K, `added_stage` (B H m) and `added_last` (B k); and
    the resulting `weight` (B H·m+k).

    The weight has no effect on directions that keep the active constraints. A few rounds of multipliers in the linear system
    remove the other directions; the larger weight makes these rounds converge fast.
    """

    stage: Tensor
    last: Tensor
    multipliers: Tensor
    added_stage: Tensor
    added_last: Tensor
    weight: Tensor

    def stiffened(self, model: lq.LQModel) -> lq.LQModel:
        """The model with the increased weight of the active constraints."""
        hessian = model.hessian + (self.stage.transpose(-1, -2) * self.added_stage.unsqueeze(-2)) @ self.stage
        last = model.terminal_hessian + (self.last.transpose(-1, -2) * self.added_last.unsqueeze(-2)) @ self.last
        return model._replace(hessian=hessian, terminal_hessian=last)

    def solve(
        self, factor: Factor, v_states: Tensor, v_actions: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """As `Factor.solve`, with the active constraints as equations. Also returns their multipliers (B H·m+k)."""
        size, shape = v_states.shape[-1], self.stage.shape[:3]
        count = shape[1] * shape[2]

        def solve(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            pull = lq.times_vector(self.stage.transpose(-1, -2), y[:, :count].view(shape))
            end = lq.times_vector(self.last.transpose(-1, -2), y[:, count:])
            s = torch.cat([v_states[:, :-1] - pull[..., :size], (v_states[:, -1] - end).unsqueeze(1)], 1)
            return factor.solve(s, v_actions - pull[..., size:])

        def broken(found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            actions, states, _ = found
            stage = lq.times_vector(self.stage, torch.cat([states[:, :-1], actions], -1))
            return torch.cat([stage.reshape(len(stage), -1), lq.times_vector(self.last, states[:, -1])], 1)

        return keep_active(solve, broken, torch.zeros_like(self.multipliers), self.weight)


def _active(objective: ConstrainedTrajectory, x: Points, states: Tensor) -> _Active:
    values = objective.constraints(x, states)
    multipliers = objective.multipliers
    assert multipliers is not None
    moved = multipliers.updated(values, torch.zeros_like(values, dtype=torch.bool))
    on_stage, on_last = objective.split((moved > 0).to(x.dtype))

    stage, last = objective.jacobians(states, objective.plan(x))
    added = objective.split((STIFFER[x.dtype] - 1) * multipliers.weight)
    weight = STIFFER[x.dtype] * multipliers.weight
    return _Active(stage * on_stage.unsqueeze(-1), last * on_last.unsqueeze(-1), moved, *added, weight)


class _Optimum(torch.autograd.Function):
    """Constant values. The derivative with respect to the residuals is −K⁻¹."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plans,
        states: Tensor,
        factor: Factor,
        active: "_Active | None",
        *residuals: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.factor, ctx.active = factor, active
        return plan.clone(), states.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        v_actions, v_states = outputs
        if ctx.active is None:
            (actions, states, dynamics), values = ctx.factor.solve(v_states, v_actions), None
        else:
            (actions, states, dynamics), values = ctx.active.solve(ctx.factor, v_states, v_actions)
            values = -values
        stage = torch.cat([states[:, :-1], actions], -1)
        return None, None, None, None, -stage, -states[:, -1], -dynamics[:, 1:], -dynamics[:, 0], values
