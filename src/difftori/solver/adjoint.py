"""How a solution is differentiated. An adjoint never sees a step rule; a solver never sees an adjoint."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver.method import Problem, choose
from difftori.solver.newton import RAISED, Factor, check_linear, conjugate_gradients, factorise
from difftori.types import PointFlags, Points, RowFlags, Rows


class Iterates(NamedTuple):
    """Where an iteration has come to: `x` to be returned (B n), `usable` (B): finite, and what `solve` keeps besides."""

    x: Points
    usable: RowFlags
    progress: Any


@runtime_checkable
class Iterate(Protocol):
    """A solver's iteration as adjoints see it."""

    def __call__(self, steps: int, differentiable: bool, progress: Any = None, *, finish: bool = True) -> Iterates:
        """Go on from `progress` (None: from x0) for so many steps; `finish`: with the solver's last refinement."""
        ...


class Differentiated(NamedTuple):
    """A differentiable solution. `convex` (B): the Hessian was positive definite on the free set, where that was looked
    at, and `singular` (B), that it could not be told from singular; `newton_step` (B): the largest coordinate of H⁻¹∇J, an estimate of the distance to the optimum.
    """

    x: Points
    iterates: Iterates
    convex: RowFlags | None = None
    newton_step: Rows | None = None
    singular: RowFlags | None = None


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
        return Differentiated(result.x.detach(), result)


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

    `linear`: "dense" factorises the Hessian (n batched Hessian-vector products), "cg" spends at most `products`
    products in the backward pass. `eigenvalue_floor`: a row is strictly convex if its smallest curvature is above this
    share of its largest, both after scaling the diagonal to 1; default: 1000 roundings (1e-4 in float32, 2e-13 in
    float64). Other rows are flagged `NOT_A_MINIMUM` or `ILL_CONDITIONED`, and their gradient is bounded: curvatures below
    1e-4 of the largest are raised to it and negative ones mirrored.

    `order`: how often the solution can be differentiated. A second derivative with `order=1` raises `SolverError`;
    `order=2` ("dense" only) makes it right, at the price of a Hessian with a graph, so that memory grows n-fold.
    """

    linear: Literal["dense", "cg"] = "dense"
    products: int = 12
    eigenvalue_floor: float | None = None
    order: Literal[1, 2] = 1

    def __post_init__(self):
        check_linear("Implicit", self.linear, self.products, self.eigenvalue_floor)
        if self.order not in (1, 2) or (self.order == 2 and self.linear == "cg"):
            raise SolverError(
                f'Implicit: order={self.order} with linear="{self.linear}" is not available. '
                'Fix: order 1, order 2 with linear="dense", or Unrolled() for any order.'
            )

    def apply(self, iterate: Iterate, problem: Problem, max_steps: int) -> Differentiated:
        """Run without a graph, then attach x = x* − H⁻¹(∇J(x*, θ) − stop(∇J)), whose value is x*."""
        result = iterate(max_steps, False)
        solution = result.x.detach()
        with torch.enable_grad():
            return self._attach(problem, solution, result)

    def _attach(self, problem: Problem, solution: Points, result: Iterates) -> Differentiated:
        usable = result.usable
        rows = usable.nonzero().squeeze(-1)
        part = None if bool(usable.all()) else problem.objective.select(rows)
        if part is not None:
            # Rows without a finite solution stay out of the graph: 0 × NaN would reach the shared parameters.
            box = problem.box.select(rows, solution)
            good = self._derivative(replace(problem, objective=part, box=box), solution[rows])
            x = solution.index_copy(0, rows, good.x)
            convex, step = torch.zeros_like(usable), torch.full_like(solution[:, 0], float("inf"))
            if good.convex is None or good.newton_step is None or good.singular is None:
                return Differentiated(x, result)
            return Differentiated(
                x,
                result,
                convex.index_copy(0, rows, good.convex),
                step.index_copy(0, rows, good.newton_step),
                convex.index_copy(0, rows, good.singular),
            )
        good = self._derivative(problem, solution)
        return Differentiated(choose(usable, good.x, solution), result, good.convex, good.newton_step, good.singular)

    def _derivative(self, problem: Problem, solution: Points) -> "_Derivative":
        if self.linear == "cg":
            _, grad = problem.with_graph().evaluate(solution)
            free = ~problem.box.held(solution, grad.detach())
            step = _ImplicitCG.apply(_Once.apply(grad), problem, solution, free, self.products)
            return _Derivative(solution + step, None, None, None)
        factor, grad = self.factor(problem, solution)
        _, differentiable = problem.with_graph().evaluate(solution)
        if self.order == 1:
            differentiable = _Once.apply(differentiable)
        x = solution - factor.solve(differentiable - differentiable.detach())
        if self.order == 2 and x.requires_grad:
            x = self._second_order(problem, x, factor.free)
        return _Derivative(x, factor.convex, factor.solve(grad).abs().amax(-1), factor.singular)

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


class _Derivative(NamedTuple):
    x: Points
    convex: RowFlags | None
    newton_step: Rows | None
    singular: RowFlags | None


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


class _ImplicitCG(torch.autograd.Function):
    """Value 0; the derivative with respect to the gradient ∇J is −H⁻¹ on the free set, by conjugate gradients."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, problem: Problem, point: Tensor, free: Tensor, products: int) -> Tensor:
        ctx.save_for_backward(point, free)
        ctx.problem, ctx.products = problem, products
        return torch.zeros_like(grad)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        point, free = ctx.saved_tensors
        return _SolveCG.apply(-outputs[0], ctx.problem, point, free, ctx.products), None, None, None, None


class _SolveCG(torch.autograd.Function):
    """H⁻¹v on the free set, which is linear in v and symmetric: its derivative is itself."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, problem: Problem, point: Tensor, free: Tensor, products: int) -> Tensor:
        ctx.save_for_backward(point, free)
        ctx.problem, ctx.products = problem, products
        return conjugate_gradients(problem, point, v, free, products).solution

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        point, free = ctx.saved_tensors
        return _SolveCG.apply(outputs[0], ctx.problem, point, free, ctx.products), None, None, None, None
