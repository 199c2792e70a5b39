"""Newton's method on the free set, and the linear algebra that it shares with the implicit gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver.compiled import compiled_call
from difftori.solver.derivatives import value_and_grad
from difftori.solver.interface import Problem, Solver, State, all_finite, choose
from difftori.solver.objective import Objective
from difftori.solver.settings import check_settings
from difftori.types import Hessians, PointFlags, Points, RowFlags, Rows


@dataclass(frozen=True)
class Newton(Solver):
    """x ← P(x − H⁻¹∇J) on the free set: the coordinates without an active bound (Bertsekas, 1982).

    Each row takes the longest of `lengths` that lowers its cost or, if rounding hides the decrease, the one that lowers its
    projected gradient. If none does, because the projection changed the direction of the step, the row takes a projected
    gradient step of length 1/‖H‖. If that does not help either, it does not move.

    Args:
        linear: "dense" factorises the n×n Hessian (n Hessian-vector products, batched into one call). "cg" uses at most
            `products` products. Default: "dense".
        products: the largest number of Hessian-vector products of "cg". Default: 12.
        eigenvalue_floor: a row is strictly convex if its smallest curvature is above this share of its largest, both after
            the diagonal is scaled to 1. Default: 1000 roundings (1e-4 in float32, 2e-13 in float64). In any other row,
            curvatures below 1e-4 of the largest are raised to that value, and negative ones are mirrored, so that the step
            descends if the cost is not convex. In unrolled derivatives, the added curvature is treated as a constant.
        lengths: the step lengths to try, longest first.
    """

    linear: Literal["dense", "cg"] = "dense"
    products: int = 12
    eigenvalue_floor: float | None = None
    lengths: tuple[float, ...] = (1.0, 0.25, 0.0625, 0.015625)

    def __post_init__(self):
        check_linear(self, ("dense", "cg"))
        check_settings(self, lengths="(0, inf)")

    def init(self, problem: Problem, x: Points) -> State:
        """Evaluate cost and gradient."""
        cost, grad = problem.evaluate(x)
        return State(cost, grad)

    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One safeguarded Newton step."""
        moves = self._moves(problem, x, state)
        waiting = torch.ones_like(state.cost, dtype=torch.bool)
        origin = x
        for move in moves:
            trial = problem.project(origin + move)
            cost, grad = problem.evaluate(trial)
            taken = waiting & improves(problem, x, state, trial, cost, grad)
            assert state.grad is not None
            state = State(torch.where(taken, cost, state.cost), choose(taken, grad, state.grad))
            x, waiting = choose(taken, trial, x), waiting & ~taken
            if not bool(waiting.any()):
                break
        return x, state

    def _moves(self, problem: Problem, x: Points, state: State) -> list[Points]:
        """The steps to try, in this order."""
        assert state.grad is not None
        if self.linear == "cg" and not problem.create_graph:
            free = ~problem.box.held(x, state.grad)
            grad, solved = state.grad, conjugate_gradients(problem, x, -state.grad, free, self.products)
            direction, curvature = solved.solution, solved.curvature.abs()
        else:
            _, grad, hessian = problem.curvature(x)
            free = ~problem.box.held(x, grad.detach())
            direction = factorise(hessian, free, self.eigenvalue_floor, RAISED).solve(-grad * free)
            curvature = hessian.detach().abs().sum(-1).amax(-1)
        # Without curvature, the longest step is 1/eps, whatever the scale of the cost.
        steepest = torch.linalg.vector_norm(grad.detach(), float("inf"), -1)
        least = (torch.finfo(x.dtype).eps * steepest).clamp_min(torch.finfo(x.dtype).tiny)
        safe = -grad / torch.maximum(curvature, least)[:, None]
        return [*(length * direction for length in self.lengths), torch.nan_to_num(safe)]


def improves(problem: Problem, x: Points, state: State, trial: Points, cost: Rows, grad: Points) -> RowFlags:
    """Which trials lower the cost of their row or, if rounding hides the difference, its projected gradient, (B)."""
    assert state.grad is not None
    noise = 8 * torch.finfo(x.dtype).eps * state.cost.abs()
    calmer = problem.box.stationarity(trial, grad) < problem.box.stationarity(x, state.grad)
    lower = cost < state.cost - noise
    return (lower | ((cost <= state.cost + noise) & calmer)) & all_finite(cost, grad)


class HessianProducts:
    """v ↦ H v at one point, with one graph for all products. A product costs about one evaluation of cost and gradient."""

    def __init__(self, problem: Problem, x: Points):
        with torch.enable_grad():
            self._point = x.detach().requires_grad_()
            _, self._grad = problem.with_graph().evaluate(self._point)
        self.grad = self._grad.detach()

    def __call__(self, v: Points) -> Points:
        """One product per row, (B n)."""
        if not self._grad.requires_grad:
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(self._grad, self._point, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if product is None else product


class Factor(NamedTuple):
    """A factorised free-set Hessian. `convex` (B): it is positive definite without raising any curvature. `singular` (B): its
    smallest curvature is zero to working precision. `defined` (B): it has no NaN or infinity.
    """

    cholesky: Hessians
    free: PointFlags
    convex: RowFlags
    singular: RowFlags
    defined: RowFlags

    def solve(self, v: Points) -> Points:
        """H⁻¹ v on the free set, zero on the other coordinates."""
        v = v * self.free
        return torch.cholesky_solve(v.unsqueeze(-1), self.cholesky).squeeze(-1) * self.free


RAISED = 1e-4
"""Curvatures of a row that is not strictly convex are raised to this share of its largest, which bounds its step."""


def factorise(hessian: Hessians, free: PointFlags, floor: float | None = None, raised: float = 0.0) -> Factor:
    """Cholesky factor of the Hessian on the free set, and whether it is positive definite to working precision.

    The diagonal is first scaled to 1, which removes the effect of badly scaled variables on the condition number. A row is
    convex if its smallest eigenvalue is then above `floor` × the largest (default: 1000 roundings), and singular if its
    smallest eigenvalue is within that of zero. Eigenvalues of other rows are mirrored if negative and raised to the larger of
    `floor` and `raised`. Coordinates outside the free set get a row and column of the identity. A row without any curvature
    has no free coordinate. Only rows that are not convex are decomposed.
    """
    eps = torch.finfo(hessian.dtype).eps
    floor = 1e3 * eps if floor is None else floor
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    finite = torch.isfinite(hessian).flatten(1).all(-1)
    both = free.unsqueeze(-1) & free.unsqueeze(-2) & finite[:, None, None]
    symmetric = torch.where(both, 0.5 * (hessian + hessian.transpose(-1, -2)), 0.0)
    size = symmetric.detach().abs()
    flat = (size.amax((-1, -2)) == 0) & free.any(-1) & finite
    unit = curvature_units(size)
    both = both & ~flat[:, None, None]
    matrix = torch.where(both, symmetric / unit.unsqueeze(-1) / unit.unsqueeze(-2), identity)
    # The largest eigenvalue lies between the largest entry and the largest row sum of a symmetric matrix.
    scale = torch.where(both, matrix.detach(), 0.0).abs().sum(-1).amax(-1)
    _, failed = torch.linalg.cholesky_ex(
        matrix.detach() - (floor * scale)[:, None, None] * torch.where(both, identity, 0.0)
    )
    convex = (failed == 0) & finite & ~flat
    singular = flat
    if not bool(convex.all()):
        rows = (~convex & finite & ~flat).nonzero().squeeze(-1)
        correction, least = _raise_curvature(matrix.detach()[rows], both[rows], max(floor, raised) * scale[rows])
        matrix = matrix.index_add(0, rows, correction)
        singular = singular.index_copy(0, rows, least >= -max(floor, 8 * eps) * scale[rows])
    cholesky, failed = torch.linalg.cholesky_ex(matrix)
    # Rounding can still make the factorisation of a raised row fail (floor 0, float32). It takes a scaled gradient step and is flagged.
    fallback = identity * scale.clamp_min(1.0).sqrt()[:, None, None]
    cholesky = torch.where((failed == 0)[:, None, None], cholesky, fallback) * unit.unsqueeze(-1)
    return Factor(cholesky, free & ~flat[:, None], convex & (failed == 0), singular, finite)


def curvature_units(size: Hessians) -> Points:
    """Square roots of the curvatures, given the absolute values of a Hessian; 1 for coordinates without curvature."""
    diagonal, largest = size.diagonal(dim1=-1, dim2=-2), size.amax(-1)
    # A diagonal entry that is tiny compared with its row does not give the scale of the coordinate; the row's largest entry does.
    unit = torch.where(diagonal > torch.finfo(size.dtype).eps * largest, diagonal, largest).sqrt()
    return torch.where(unit > torch.finfo(size.dtype).tiny, unit, 1.0)


def _raise_curvature(matrix: Hessians, both: Tensor, floor: Tensor) -> tuple[Hessians, Rows]:
    """The correction that changes every curvature λ of the free set to max(|λ|, floor), and the smallest λ."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = floor.clamp_min(torch.finfo(matrix.dtype).eps)
    correction = torch.maximum(values.abs(), floor[:, None]) - values
    return (vectors * correction.unsqueeze(-2)) @ vectors.transpose(-1, -2) * both, values[:, 0]


class ConjugateGradients(NamedTuple):
    """The state of the iteration for H w = rhs, row by row.

    `solution` w (B n); `residual` and `direction` (B n); `size` (B), the square of the residual, and `goal` (B), its value to
    stop at; `active` (B): unfinished rows; `curvature` (B): rᵀHr/rᵀr of the first direction r = rhs; `positive` (B): no
    direction so far had negative curvature; `begun` (B): the square of rhs.
    """

    solution: Points
    residual: Points
    direction: Points
    size: Rows
    goal: Rows
    active: RowFlags
    curvature: Rows
    positive: RowFlags
    begun: Rows

    def unsolved(self, tolerance: float) -> RowFlags:
        """Rows with negative curvature, or with a residual above this share of the right-hand side, (B)."""
        return ~self.positive | (self.size > tolerance**2 * self.begun)

    def proceed(self, products: Callable[[Points], Points], free: PointFlags, count: int) -> "ConjugateGradients":
        """Use `count` more products. A row stops at negative curvature with its current solution.

        Stopping there keeps w in the subspace where the Hessian is positive definite, which is the safeguard for rows that are
        not strict minima (Steihaug, 1983).
        """
        w, residual, direction, size, goal, active, first, positive, begun = self
        for _ in range(count):
            image = products(direction) * free
            along = (direction * image).sum(-1)
            first = torch.where(torch.isnan(first), along / size.clamp_min(torch.finfo(size.dtype).tiny), first)
            positive = positive & (~active | (along > 0))
            active = active & (along > 0)
            length = torch.where(active, size / torch.where(active, along, 1.0), 0.0)[:, None]
            w, residual = w + length * direction, residual - length * image
            new_size = residual.square().sum(-1)
            ratio = torch.where(active, new_size / torch.where(size > 0, size, 1.0), 0.0)
            direction, size = residual + ratio[:, None] * direction, new_size
            active = active & (size > goal)
        return ConjugateGradients(w, residual, direction, size, goal, active, first, positive, begun)


def conjugate_gradients(
    problem: Problem, x: Points, rhs: Points, free: PointFlags, max_products: int, tolerance: float | None = None
) -> ConjugateGradients:
    """Solve H w = rhs at x on the free set, without a graph, all rows at once, with at most `max_products` products.

    A row is solved when its residual is at most `tolerance` × rhs. Default: ten roundings.
    """
    # Scaled by its largest coordinate, so that squares stay within the range of float32.
    unit = torch.linalg.vector_norm(rhs * free, float("inf"), -1, keepdim=True)
    rhs = rhs * free / torch.where(unit > 0, unit, 1.0)
    size = rhs.square().sum(-1)
    goal = (10 * torch.finfo(rhs.dtype).eps if tolerance is None else tolerance) ** 2 * size
    nothing = torch.full_like(size, float("nan"))
    yes = torch.ones_like(size, dtype=torch.bool)
    state = ConjugateGradients(torch.zeros_like(rhs), rhs, rhs, size, goal, size > 0, nothing, yes, size)
    products = None if problem.compile else HessianProducts(problem, x)
    chunk = _COMPILED_PRODUCTS if products is None else 1
    for done in range(0, max_products, chunk):
        if not bool(state.active.any()):
            break
        count = min(chunk, max_products - done)
        if products is None:
            state = compiled_call(_compilable, problem.objective, x.detach(), state, free, count)
        else:
            state = state.proceed(products, free, count)
    return state._replace(solution=unit * state.solution)


_COMPILED_PRODUCTS = 4
"""Number of products compiled together. Each chunk linearises again; longer ones would take minutes to compile."""


def _compilable(
    objective: Objective, x: Points, state: ConjugateGradients, free: PointFlags, count: int
) -> ConjugateGradients:
    pullback = torch.func.vjp(lambda point: value_and_grad(objective, point, create_graph=True)[1], x)[1]
    return state.proceed(lambda v: pullback(v)[0], free, count)


def check_linear(owner: Any, known: tuple[str, ...]) -> None:
    """Raise SolverError for invalid settings `linear`, `products` and `eigenvalue_floor`."""
    if owner.linear not in known:
        raise SolverError(
            f"{type(owner).__name__}: linear={owner.linear!r} is unknown. Fix: use one of {', '.join(known)}."
        )
    check_settings(owner, products="[1, inf)", eigenvalue_floor="[0, 1)")
