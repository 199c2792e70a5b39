"""Adjoints: how a solution is differentiated. Adjoints do not depend on step rules, and solvers do not depend on adjoints."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver import kkt
from difftori.solver.active_constraints import ActiveFactor, factorise_active, multipliers_of
from difftori.solver.constraints import Constrained, ConstrainedFunction
from difftori.solver.contraction import Contraction
from difftori.solver.implicit_cg import ImplicitCG, InverseProducts
from difftori.solver.interface import Problem, choose
from difftori.solver.newton import RAISED, Factor, check_linear, factorise
from difftori.solver.objective import Objective, TrajectoryObjective
from difftori.solver.settings import check_settings
from difftori.types import PointFlags, Points, RowFlags


class Iterates(NamedTuple):
    """The result of an iteration: `x` to return (B n), `usable` (B), true for finite rows, `progress`, the state needed to
    resume the iteration, `states` (B H+1 S), the trajectory that belongs to x if the solver computes it, and `contraction` of an
    iteration with a graph and a tolerance.
    """

    x: Points
    usable: RowFlags
    progress: Any
    states: Tensor | None = None
    contraction: Contraction | None = None


@runtime_checkable
class Iterate(Protocol):
    """Interface of a solver's iteration for adjoints."""

    def __call__(self, steps: int, differentiable: bool, progress: Any = None, *, finish: bool = True) -> Iterates:
        """Run `steps` steps from `progress` (None: from x0). `finish`: apply the solver's final refinement; default: True."""
        ...


class Differentiated(NamedTuple):
    """A differentiable solution.

    `convex` (B): the Hessian is positive definite on the free set; `singular` (B): the Hessian is singular to working
    precision. Both are None if no Hessian was computed. `newton_step` (B n): H⁻¹∇J, an estimate of
    the distance to the optimum. `states` (B H+1 S): the states of a trajectory, with the same derivative, if the adjoint
    computes it. `solves`: the linear solves of the backward pass; after it they list the rows that were not solved. `contraction`: what
    the backward pass of an unrolled solve measures.
    """

    x: Points
    iterates: Iterates
    convex: RowFlags | None = None
    newton_step: Points | None = None
    singular: RowFlags | None = None
    states: Tensor | None = None
    solves: InverseProducts | None = None
    contraction: Contraction | None = None


class Adjoint(ABC):
    """A way to differentiate the solution of a problem with respect to every tensor that its objective uses."""

    @abstractmethod
    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run the iteration and return its result with the derivative of this adjoint attached."""


@dataclass(frozen=True)
class Detached(Adjoint):
    """No derivative: the solution is a constant. Use it for inference, and for planners without a gradient (TD-MPC)."""

    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run the iteration without a graph."""
        result = iterate(max_steps, False)
        return Differentiated(result.x.detach(), result, states=result.states)


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """The derivative of the computation, by backpropagation through every step. Memory grows with the steps.

    What a solver takes as a constant has no derivative: the step lengths of `ProjectedGradient` unless `exact_unrolling` is
    set, and the curvature that `Newton` adds where the cost is not convex.
    """

    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run the iteration with a graph."""
        return _unrolled(iterate(max_steps, True))


@dataclass(frozen=True)
class Truncated(Adjoint):
    """Backpropagation through the last `k` steps only (Shaban et al., 2019). The release uses k = 5, the default.

    The gradient is biased, even at the optimum, unless k steps contract nearly all the way. With `keep="best"` the result is
    the best of the last k iterates and the iterate before them. If that earlier iterate is the best, the result has no
    derivative.
    """

    k: int = 5

    def __post_init__(self):
        check_settings(self, k="[1, inf)")

    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run all but k steps without a graph, then k steps with a graph."""
        tail = min(self.k, max_steps)
        if tail == max_steps:
            return Unrolled().apply(iterate, problem, max_steps)
        before = iterate(max_steps - tail, False, finish=False)
        return _unrolled(iterate(tail, True, before.progress))


def _unrolled(result: Iterates) -> Differentiated:
    """The result of steps with a graph. Unusable rows have no derivative."""
    x = choose(result.usable, result.x, result.x.detach())
    return Differentiated(x, result, contraction=result.contraction)


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The derivative of the optimum, by the implicit function theorem on the free set.

    The free set F contains the coordinates without an active bound: dx_F/dθ = −H_FF⁻¹ ∂∇_F J/∂θ, and dx/dθ = 0 for the
    others. The derivative is exact at a strict local optimum, for any solver. It does not depend on x0 and needs constant
    memory. Far from an optimum it is not meaningful: `Solution.gradient_valid` marks the rows with a trustworthy gradient.

    Args:
        linear: how to solve with H. "dense" factorises it (n batched Hessian-vector products). "cg" uses at most `products`
            products in the backward pass. "riccati" solves the optimality conditions of states and actions of a
            `TrajectoryObjective` by one sweep, in time linear in the horizon, and is accurate for unstable dynamics too. "auto"
            uses the sweep after `ILQR` and where it costs less, else "dense" up to 48 variables and "cg" for more. Default: "auto".
        products: the largest number of Hessian-vector products of "cg". Default: 12 with linear="cg", max(n, 48) with "auto".
        eigenvalue_floor: a row is strictly convex if its smallest curvature is above this share of its largest, both after
            the diagonal is scaled to 1. Default: 1000 roundings (1e-4 in float32, 2e-13 in float64). Other rows get the status
            `NOT_A_MINIMUM` or `ILL_CONDITIONED`, and their gradient is bounded: curvatures below 1e-4 of the largest are
            raised to that value, and negative ones are mirrored.
        order: how often the solution can be differentiated. A second derivative with `order=1` raises `SolverError`.
            `order=2` ("dense" only) computes it correctly, with n times the memory, because the Hessian has a graph. Default: 1.
    """

    linear: Literal["auto", "dense", "cg", "riccati"] = "auto"
    products: int | None = None
    eigenvalue_floor: float | None = None
    order: Literal[1, 2] = 1

    def __post_init__(self):
        check_linear(self, ("auto", "dense", "cg", "riccati"))
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
        # Rows without a finite solution stay out of the graph: 0 × NaN would make the gradients of shared parameters NaN.
        part = None if bool(usable.all()) else problem.objective.select(rows)
        alone = part is not None and _is_part(problem.objective, part, solution, rows)
        if part is not None and not alone:
            if not len(rows):
                return _no_derivative(result)
            # The functions close over a value for each row, which cannot be selected: a good row takes the place of the others.
            rows = torch.where(usable, torch.arange(len(usable), device=rows.device), rows[:1])
            part = problem.objective.select(rows)
        if part is not None:
            box = problem.box.select(rows, solution)
            problem = replace(problem, objective=part, box=box)
            states = None if states is None else states[rows]
        good = self._derivative(problem, solution if part is None else solution[rows], states)
        if alone:
            return good.spread(rows, usable).of(result, solution.index_copy(0, rows, good.x))
        return good.of(result, choose(usable, good.x, solution))

    def _derivative(self, problem: Problem, solution: Points, states: Tensor | None) -> "_Derivative":
        linear = self.method(problem, solution, states is not None)
        if linear == "riccati":
            return self._along_states(problem, solution, states)
        if linear == "cg":
            _, grad = problem.with_graph().evaluate(solution)
            free = ~problem.box.held(solution, grad.detach())
            solves = InverseProducts(problem, solution, free, *self._budget(solution))
            step = ImplicitCG.apply(_Once.apply(grad), solves)
            return _Derivative(solution + step, None, None, None, None, solves)
        if isinstance(problem.objective, ConstrainedFunction):
            return self._constrained(problem, problem.objective, solution)
        factor, grad = self.factor(problem, solution)
        if self.linear == "auto" and self.order == 1 and _staged(problem.objective) and not bool(factor.defined.all()):
            # The sweep takes second derivatives that are undefined, as that of a norm at zero, a small distance away.
            return self._along_states(problem, solution, states)
        _, differentiable = problem.with_graph().evaluate(solution)
        if self.order == 1:
            differentiable = _Once.apply(differentiable)
        x = solution - factor.solve(differentiable - differentiable.detach())
        if self.order == 2 and x.requires_grad:
            x = self._second_order(problem, x, factor.free)
        return _Derivative(x, factor.convex, factor.solve(grad), factor.singular)

    def _along_states(self, problem: Problem, solution: Points, states: Tensor | None) -> "_Derivative":
        """Differentiate the optimality conditions of states and actions."""
        objective = problem.objective
        assert isinstance(objective, TrajectoryObjective)
        if states is None:
            with torch.no_grad():
                states = objective.rollout(solution)
        found = kkt.differentiate(problem, solution, states, _Once.apply)
        return _Derivative(found.actions, found.convex, found.newton_step, found.singular, found.states)

    def _constrained(self, problem: Problem, objective: ConstrainedFunction, solution: Points) -> "_Derivative":
        """Differentiate the optimality conditions with the active constraints as equations."""
        multipliers = objective.multipliers
        assert multipliers is not None
        with torch.no_grad():
            moved = multipliers.updated(objective.constraints(solution), objective.equality(solution))
            on = ((moved > 0) | objective.equality(solution)).to(solution.dtype)
        jacobian = objective.jacobian(solution) * on.unsqueeze(-1)
        # Not compiled: each call has another Lagrangian.
        _, grad = replace(problem, objective=objective.lagrangian(moved), compile=False).evaluate(solution)
        free = ~problem.box.held(solution, grad)
        # More accurate than the multipliers of the last round, which amplify the errors of x by the penalty weight.
        exact = moved - multipliers_of(grad, jacobian, free)
        lagrangian = replace(problem, objective=objective.lagrangian(exact), compile=False)
        _, grad, hessian = lagrangian.curvature(solution)
        factor = factorise_active(hessian, jacobian, free, self.eigenvalue_floor)
        _, residual = lagrangian.with_graph().evaluate(solution)
        values = objective.constraints(solution)
        x = solution + _ImplicitConstrained.apply(_Once.apply(residual), values, factor)
        return _Derivative(x, factor.factor.convex, factor.solve(grad)[0], factor.factor.singular)

    def method(self, problem: Problem, x: Points, carried: bool) -> str:
        """The method for the linear system: "dense", "cg" or "riccati". `carried`: the solver computed the states of the trajectory."""
        objective, n = problem.objective, x.shape[-1]
        structured = _staged(objective)
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
        if isinstance(objective, TrajectoryObjective) and structured:
            # Products with the derivatives of one step that the sweep needs, in addition to the rollouts that the dense Hessian needs.
            size = objective.state.shape[-1]
            if carried or 3 * size + 2 * objective.action_dim < min(n, _DENSE):
                return "riccati"
        return "dense" if n <= _DENSE else "cg"

    def _budget(self, x: Points) -> tuple[int, float]:
        """The largest number of products, and the relative residual at which conjugate gradients stop."""
        if self.linear == "cg":
            return 12 if self.products is None else self.products, 10 * torch.finfo(x.dtype).eps
        products = max(x.shape[-1], _DENSE) if self.products is None else self.products
        return products, torch.finfo(x.dtype).eps ** 0.5

    def examine(self, problem: Problem, x: Points) -> tuple[RowFlags, Points, Callable[[Points], Points]]:
        """Which rows are strict minima, (B), H⁻¹∇J (B n), and v ↦ H⁻¹v on the free set, after an adjoint that did not compute them."""
        if self.method(problem, x, False) != "cg" or self.linear == "cg":
            factor, grad = self.factor(problem, x)
            return factor.convex, factor.solve(grad), factor.solve
        _, grad = problem.evaluate(x)
        solves = InverseProducts(problem, x, ~problem.box.held(x, grad), *self._budget(x))
        step = solves(grad)
        assert solves.unsolved is not None
        return ~solves.unsolved, step, solves

    def _second_order(self, problem: Problem, x: Points, free: PointFlags) -> Points:
        """One more Newton step N(x, θ) = x − H⁻¹∇J, with value x. ∂N/∂x is zero at the optimum. The missing second derivative
        of x therefore does not matter, and the second derivative of N is that of the solution.
        """
        _, grad, hessian = problem.with_graph().curvature(x)
        step = factorise(hessian, free, self.eigenvalue_floor, RAISED).solve(grad)
        return x - (step - step.detach())

    def factor(self, problem: Problem, x: Points) -> tuple[Factor, Points]:
        """The factorised free-set Hessian and the gradient at x. The factor also marks the rows that are strict minima."""
        _, grad, hessian = problem.curvature(x)
        return factorise(hessian, ~problem.box.held(x, grad), self.eigenvalue_floor, RAISED), grad


_DENSE = 48
"""Hessian-vector products that the sweep or the dense Hessian may cost under "auto"; beyond, conjugate gradients need fewer."""


def _staged(objective: Objective) -> bool:
    return isinstance(objective, TrajectoryObjective) and objective.staged


def _no_derivative(result: Iterates) -> Differentiated:
    """The result of a batch without any finite row. It has no graph, because NaN would reach the gradients of all parameters."""
    x, none = result.x.detach(), torch.zeros_like(result.usable)
    return Differentiated(x, result, none, torch.full_like(x, torch.inf), none, result.states)


def _is_part(whole: Objective, part: Objective, x: Points, rows: Tensor) -> bool:
    """Whether an objective that was selected from another one has the same costs."""
    with torch.no_grad():
        try:
            found, expected = part.cost(x[rows]), whole.cost(x)[rows]
        except (RuntimeError, ValueError, IndexError):
            return False
        return found.shape == expected.shape and bool(torch.isclose(found, expected, rtol=1e-3, atol=1e-6).all())


class _Derivative(NamedTuple):
    """The result of `_derivative`, for all rows or a subset."""

    x: Points
    convex: RowFlags | None
    newton_step: Points | None
    singular: RowFlags | None
    states: Tensor | None = None
    solves: InverseProducts | None = None

    def spread(self, rows: Tensor, usable: RowFlags) -> "_Derivative":
        """Extend the result of a subset of rows to all rows. The other rows are marked as not minima."""

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
        """Convert to the result of an adjoint."""
        return Differentiated(x, result, self.convex, self.newton_step, self.singular, self.states, self.solves)


class _Once(torch.autograd.Function):
    """The identity. Its derivative raises an error if it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Tensor:
        (grad,) = ctx.saved_tensors
        # The result is zero, but connected to every tensor that the gradient of the cost depends on, so any second derivative reaches it.
        return outputs[0] + _NoSecondDerivative.apply(grad) if torch.is_grad_enabled() else outputs[0]


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Tensor:
        raise SolverError(
            "a second derivative of a solution was requested, but Implicit(order=1) supports first derivatives only. "
            "Fix: adjoint=Implicit(order=2), or Unrolled()."
        )


class _ImplicitConstrained(torch.autograd.Function):
    """Value 0. The derivative with respect to the gradient of the Lagrangian and the active constraint values is −K⁻¹."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, values: Tensor, factor: ActiveFactor) -> Tensor:
        ctx.factor = factor
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        move, y = ctx.factor.solve(outputs[0])
        return -move, -y, None
