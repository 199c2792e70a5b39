"""How a solution is differentiated. An adjoint never sees a step rule; a solver never sees an adjoint."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver import kkt
from difftori.solver.constraints import Constrained, ConstrainedFunction
from difftori.solver.derivatives import row_jacobian
from difftori.solver.implicit_cg import ImplicitCG, InverseProducts
from difftori.solver.method import Problem, choose
from difftori.solver.newton import RAISED, Factor, check_linear, factorise
from difftori.solver.objective import TrajectoryObjective
from difftori.types import PointFlags, Points, RowFlags, Rows


class Iterates(NamedTuple):
    """Where an iteration has come to: `x` to be returned (B n), `usable` (B): finite, what `solve` keeps besides, and the
    `states` (B H+1 S) that belong to x where the solver carries them.
    """

    x: Points
    usable: RowFlags
    progress: Any
    states: Tensor | None = None


@runtime_checkable
class Iterate(Protocol):
    """A solver's iteration as adjoints see it."""

    def __call__(self, steps: int, differentiable: bool, progress: Any = None, *, finish: bool = True) -> Iterates:
        """Go on from `progress` (None: from x0) for so many steps; `finish`: with the solver's last refinement."""
        ...


class Differentiated(NamedTuple):
    """A differentiable solution. `convex` (B): the Hessian was positive definite on the free set, where that was looked
    at, and `singular` (B), that it could not be told from singular; `newton_step` (B): the largest coordinate of H⁻¹∇J, an estimate of the distance to the optimum.
    `states` (B H+1 S): those of a trajectory, with the same derivative, where the adjoint works on them. `solves`: the
    linear solves of the backward pass, which know after it which rows they did not solve.
    """

    x: Points
    iterates: Iterates
    convex: RowFlags | None = None
    newton_step: Rows | None = None
    singular: RowFlags | None = None
    states: Tensor | None = None
    solves: InverseProducts | None = None


class Adjoint(ABC):
    """A way to differentiate the solution of a problem with respect to all that its objective uses."""

    @abstractmethod
    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run the iteration and return its result with this adjoint's derivative attached."""


@dataclass(frozen=True)
class Detached(Adjoint):
    """No derivative: the solution is a constant. For acting, and for planners that are not trained through (TD-MPC)."""

    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run without a graph."""
        result = iterate(max_steps, False)
        return Differentiated(result.x.detach(), result, states=result.states)


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """The exact derivative of what was computed, by backpropagation through every step. Memory grows with the steps."""

    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run with a graph."""
        result = iterate(max_steps, True)
        return Differentiated(choose(result.usable, result.x, result.x.detach()), result)


@dataclass(frozen=True)
class Truncated(Adjoint):
    """Backpropagation through the last `k` steps only, as the release does with k = 5 (Shaban et al., 2019).

    Biased, even at the optimum, unless k steps contract nearly all the way. With `keep="best"` the best of the last k
    iterates and the one before them is returned: earlier ones have no derivative, and neither has that one if it is best.
    """

    k: int = 5

    def __post_init__(self):
        if self.k < 1:
            raise SolverError(f"Truncated: k={self.k} differentiates no step; use k ≥ 1, or Detached().")

    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run all but k steps without a graph, then k with one."""
        tail = min(self.k, max_steps)
        if tail == max_steps:
            return Unrolled().apply(iterate, problem, max_steps)
        before = iterate(max_steps - tail, False, finish=False)
        result = iterate(tail, True, before.progress)
        return Differentiated(choose(result.usable, result.x, result.x.detach()), result)


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The derivative of the optimum itself, by the implicit function theorem on the free set.

    With F the coordinates that the box does not hold, dx_F/dθ = −H_FF⁻¹ ∂∇_F J/∂θ, and dx/dθ = 0 for the held ones. Exact
    at a strict local optimum, whichever solver found it; independent of x0; constant memory. Far from an optimum it
    means little: `Solution.gradient_valid` says which rows to trust.

    `linear` says how H is solved with. "dense" factorises it (n batched Hessian-vector products). "cg" spends at most
    `products` products in the backward pass. "riccati", for a `TrajectoryObjective`, solves the optimality conditions of
    states and actions by one sweep, in time linear in the horizon, and right for unstable dynamics too. "auto", the
    default, takes the sweep after `ILQR` and where it costs less, else "dense" up to 48 variables and "cg" beyond.
    `eigenvalue_floor`: a row is strictly convex if its smallest curvature is above this
    share of its largest, both after scaling the diagonal to 1; default: 1000 roundings (1e-4 in float32, 2e-13 in
    float64). Other rows are flagged `NOT_A_MINIMUM` or `ILL_CONDITIONED`, and their gradient is bounded: curvatures below
    1e-4 of the largest are raised to it and negative ones mirrored.

    `order`: how often the solution can be differentiated. A second derivative with `order=1` raises `SolverError`;
    `order=2` ("dense" only) makes it right, at the price of a Hessian with a graph, so that memory grows n-fold.
    """

    linear: Literal["auto", "dense", "cg", "riccati"] = "auto"
    products: int | None = None
    eigenvalue_floor: float | None = None
    order: Literal[1, 2] = 1

    def __post_init__(self):
        check_linear("Implicit", self.linear, self.products, self.eigenvalue_floor, ("auto", "dense", "cg", "riccati"))
        if self.order not in (1, 2) or (self.order == 2 and self.linear in ("cg", "riccati")):
            raise SolverError(
                f'Implicit: order={self.order} with linear="{self.linear}" is not available. '
                'Fix: order 1, order 2 with linear="dense", or Unrolled() for any order.'
            )

    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run without a graph, then attach x = x* − H⁻¹(∇J(x*, θ) − stop(∇J)), whose value is x*."""
        result = iterate(max_steps, False)
        with torch.enable_grad():
            return self._attach(problem, result)

    def _attach(self, problem: Problem, result: Iterates) -> Differentiated:
        usable, solution, states = result.usable, result.x.detach(), result.states
        rows = usable.nonzero().squeeze(-1)
        part = None if bool(usable.all()) else problem.objective.select(rows)
        if part is None:
            good = self._derivative(problem, solution, states)
            return good.of(result, choose(usable, good.x, solution))
        # Rows without a finite solution stay out of the graph: 0 × NaN would reach the shared parameters.
        box = problem.box.select(rows, solution)
        states = None if states is None else states[rows]
        good = self._derivative(replace(problem, objective=part, box=box), solution[rows], states)
        return good.spread(rows, usable).of(result, solution.index_copy(0, rows, good.x))

    def _derivative(self, problem: Problem, solution: Points, states: Tensor | None) -> "_Derivative":
        linear = self.method(problem, solution, states is not None)
        if linear == "riccati":
            objective = problem.objective
            assert isinstance(objective, TrajectoryObjective)
            if states is None:
                with torch.no_grad():
                    states = objective.rollout(solution)
            found = kkt.differentiate(problem, solution, states, _Once.apply)
            return _Derivative(found.actions, found.convex, found.newton_step, found.singular, found.states)
        if linear == "cg":
            _, grad = problem.with_graph().evaluate(solution)
            free = ~problem.box.held(solution, grad.detach())
            solves = InverseProducts(problem, solution, free, *self._budget(solution))
            step = ImplicitCG.apply(_Once.apply(grad), solves)
            return _Derivative(solution + step, None, None, None, None, solves)
        if isinstance(problem.objective, ConstrainedFunction):
            return self._constrained(problem, problem.objective, solution)
        factor, grad = self.factor(problem, solution)
        _, differentiable = problem.with_graph().evaluate(solution)
        if self.order == 1:
            differentiable = _Once.apply(differentiable)
        x = solution - factor.solve(differentiable - differentiable.detach())
        if self.order == 2 and x.requires_grad:
            x = self._second_order(problem, x, factor.free)
        return _Derivative(x, factor.convex, factor.solve(grad).abs().amax(-1), factor.singular)

    def _constrained(self, problem: Problem, objective: ConstrainedFunction, solution: Points) -> "_Derivative":
        """The optimality conditions with the active constraints as equations, by multipliers within the linear system."""
        multipliers = objective.multipliers
        assert multipliers is not None
        with torch.no_grad():
            moved = multipliers.updated(objective.constraints(solution), objective.equality(solution))
            on = ((moved > 0) | objective.equality(solution)).to(solution.dtype)
        jacobian = _constraint_jacobian(objective, solution) * on.unsqueeze(-1)
        weight = _STIFFER * multipliers.weight
        _, grad, hessian = problem.curvature(solution)
        extra = (weight - multipliers.weight)[:, None, None]
        hessian = hessian + extra * (jacobian.transpose(-1, -2) @ jacobian)
        factor = factorise(hessian, ~problem.box.held(solution, grad), self.eigenvalue_floor, RAISED)
        plain = replace(problem, objective=objective.lagrangian(moved), create_graph=True)
        _, residual = plain.evaluate(solution)
        values = objective.constraints(solution)
        x = solution + _ImplicitConstrained.apply(_Once.apply(residual), values, factor, jacobian, weight)
        return _Derivative(x, factor.convex, factor.solve(grad).abs().amax(-1), factor.singular)

    def method(self, problem: Problem, x: Points, carried: bool) -> str:
        """How the linear system is solved: "dense", "cg" or "riccati". `carried`: the solver gave the trajectory's states."""
        objective, n = problem.objective, x.shape[-1]
        structured = isinstance(objective, TrajectoryObjective) and objective.staged
        if self.linear == "riccati" and not structured:
            raise SolverError(
                f'Implicit: linear="riccati" needs a TrajectoryObjective with stages, not a {type(objective).__name__}. '
                'Fix: linear="dense" or "cg".'
            )
        constrained = isinstance(objective, Constrained)
        if constrained and (self.order == 2 or self.linear == "cg" or (structured and self.linear == "dense")):
            raise SolverError(
                f'Implicit: linear="{self.linear}", order={self.order} is not available with constraints. Fix: Implicit().'
            )
        if self.linear != "auto":
            return self.linear
        if constrained:
            return "riccati" if structured else "dense"
        if self.order == 2:
            return "dense"
        if isinstance(objective, TrajectoryObjective) and objective.staged:
            # Products with one step's derivatives that the sweep needs, beside the rollouts' that the dense Hessian needs.
            size = objective.state.shape[-1]
            if carried or 3 * size + 2 * objective.action_dim < min(n, _DENSE):
                return "riccati"
        return "dense" if n <= _DENSE else "cg"

    def _budget(self, x: Points) -> tuple[int, float]:
        """Products at most, and the relative residual at which conjugate gradients stop."""
        if self.linear == "cg":
            return 12 if self.products is None else self.products, 10 * torch.finfo(x.dtype).eps
        products = max(x.shape[-1], _DENSE) if self.products is None else self.products
        return products, torch.finfo(x.dtype).eps ** 0.5

    def examine(self, problem: Problem, x: Points) -> tuple[RowFlags, Rows]:
        """Which rows are strict minima, (B), and the largest coordinate of H⁻¹∇J, (B), where `apply` did not look."""
        if self.method(problem, x, False) != "cg" or self.linear == "cg":
            factor, grad = self.factor(problem, x)
            return factor.convex, factor.solve(grad).abs().amax(-1)
        _, grad = problem.evaluate(x)
        solves = InverseProducts(problem, x, ~problem.box.held(x, grad), *self._budget(x))
        step = solves(grad)
        assert solves.unsolved is not None
        return ~solves.unsolved, step.abs().amax(-1)

    def _second_order(self, problem: Problem, x: Points, free: PointFlags) -> Points:
        """One Newton step N(x, θ) = x − H⁻¹∇J more, with value x. ∂N/∂x is zero at the optimum, so that the missing
        second derivative of x does not matter, and that of N is the solution's.
        """
        _, grad, hessian = problem.with_graph().curvature(x)
        step = factorise(hessian, free, self.eigenvalue_floor, RAISED).solve(grad)
        return x - (step - step.detach())

    def factor(self, problem: Problem, x: Points) -> tuple[Factor, Points]:
        """The factorised free-set Hessian and the gradient at x; says which rows are strict minima."""
        _, grad, hessian = problem.curvature(x)
        return factorise(hessian, ~problem.box.held(x, grad), self.eigenvalue_floor, RAISED), grad


_DENSE = 48
"""The most Hessian-vector products that "auto" spends without a choice; beyond, conjugate gradients need fewer."""


class _Derivative(NamedTuple):
    """What `_derivative` found, for all rows or for some."""

    x: Points
    convex: RowFlags | None
    newton_step: Rows | None
    singular: RowFlags | None
    states: Tensor | None = None
    solves: InverseProducts | None = None

    def spread(self, rows: Tensor, usable: RowFlags) -> "_Derivative":
        """The same for all rows, of which these are some: the others are no minima."""

        def over(part: Tensor | None, other: float | bool) -> Tensor | None:
            if part is None:
                return None
            everywhere = part.new_full((len(usable), *part.shape[1:]), other)
            return everywhere.index_copy(0, rows, part)

        return _Derivative(
            self.x,
            over(self.convex, False),
            over(self.newton_step, float("inf")),
            over(self.singular, False),
            over(self.states, float("nan")),
            self.solves,
        )

    def of(self, result: Iterates, x: Points) -> Differentiated:
        """As an adjoint returns it."""
        return Differentiated(x, result, self.convex, self.newton_step, self.singular, self.states, self.solves)


class _Once(torch.autograd.Function):
    """The identity, whose derivative says so when it is asked for a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Tensor:
        (grad,) = ctx.saved_tensors
        # Zero, but reached by every second derivative with respect to what the gradient of the cost depends on.
        return outputs[0] + _Refused.apply(grad) if torch.is_grad_enabled() else outputs[0]


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Tensor:
        raise SolverError(
            "the second derivative of a solution was asked for, and Implicit(order=1) has only the first. "
            "Fix: adjoint=Implicit(order=2), or Unrolled()."
        )


def _constraint_jacobian(objective: ConstrainedFunction, x: Points) -> Tensor:
    """Derivatives (B M n) of the constraints' values (B M)."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        return row_jacobian(objective.constraints(point), point).detach()


_ROUNDS = 6
_STIFFER = 1e3
"""By how much the weight of active constraints is raised in the linear system, so that few rounds solve it."""


class _ImplicitConstrained(torch.autograd.Function):
    """Value 0; the derivative with respect to the Lagrangian's gradient and the active constraints' values is −K⁻¹."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, values: Tensor, factor: Factor, jacobian: Tensor, weight: Rows) -> Tensor:
        ctx.factor, ctx.jacobian, ctx.weight = factor, jacobian, weight
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        jacobian, y = ctx.jacobian, torch.zeros_like(ctx.jacobian[..., 0])
        move = ctx.factor.solve(outputs[0])
        for _ in range(_ROUNDS):
            y = y + ctx.weight[:, None] * (jacobian @ move.unsqueeze(-1)).squeeze(-1)
            move = ctx.factor.solve(outputs[0] - (jacobian.transpose(-1, -2) @ y.unsqueeze(-1)).squeeze(-1))
        return -move, -y, None, None, None
