"""Compare the gradient of a solution with finite differences, for your own objective."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difftori.errors import ObjectiveError
from difftori.solver.adjoint import Adjoint
from difftori.solver.augmented_lagrangian import AugmentedLagrangian
from difftori.solver.box import Box
from difftori.solver.constraints import Constrained, ConstrainedFunction
from difftori.solver.interface import Solver
from difftori.solver.objective import Objective, as_objective
from difftori.solver.solve import solve
from difftori.types import Points


@dataclass(frozen=True)
class GradientCheck:
    """Directional derivatives of one random linear functional of the solution: `analytic` and `numeric`, one for each
    direction. `cosine` and `relative_error` compare the two lists; `ok` is true if relative_error ≤ tolerance.
    """

    analytic: tuple[float, ...]
    numeric: tuple[float, ...]
    cosine: float
    relative_error: float
    ok: bool


def check_gradients(
    objective: Objective | Callable[[Tensor], Tensor],
    x0: Points,
    *,
    parameters: Sequence[Tensor] | None = None,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    box: Box | None = None,
    max_steps: int = 100,
    inequality: Callable[[Tensor], Tensor] | None = None,
    equality: Callable[[Tensor], Tensor] | None = None,
    augmented: AugmentedLagrangian | None = None,
    directions: int = 8,
    epsilon: float | None = None,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> GradientCheck:
    """Compare an adjoint with central differences, in random directions of the parameters that the objective uses.

    Each direction moves every parameter at once by ±ε and solves again from x0. Use float64: in float32 the differences
    themselves are accurate to a few per cent only.

    Args:
        objective, x0, solver, adjoint, box, max_steps, inequality, equality, augmented: as for `solve`. By default constraints
            are solved to 1e-9 in float64, because differences need more accurate solutions than `solve` gives by default.
        parameters: leaf tensors to differentiate with respect to. Default: all leaves in the graph of the objective and of the
            constraints.
        directions: number of random directions.
        epsilon: step of the differences, relative to the root mean square of each parameter. Default: 1e-5 in float64,
            1e-2 in float32.
        tolerance: the largest relative error that counts as agreement.
        seed: seed of the random functional and directions.

    Raises:
        ObjectiveError: no parameter that requires a gradient was given or found.
    """
    objective = as_objective(objective)
    if inequality is not None or equality is not None:
        objective = ConstrainedFunction(objective, inequality, equality)
    leaves = list(parameters) if parameters is not None else _leaves(_everything(objective, x0))
    if augmented is None and x0.dtype == torch.float64:
        augmented = AugmentedLagrangian(tolerance=1e-9)
    if not leaves:
        raise ObjectiveError(
            "check_gradients: the objective uses no leaf tensor that requires a gradient. Fix: call .requires_grad_() on the "
            "tensors to differentiate with respect to, or pass them as parameters=."
        )
    generator = torch.Generator().manual_seed(seed)
    weights = _noise(x0, generator)

    def functional() -> Tensor:
        sol = solve(objective, x0, solver=solver, adjoint=adjoint, box=box, max_steps=max_steps, augmented=augmented)
        return (sol.x * weights).sum()

    value = functional()
    found = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    step = epsilon if epsilon is not None else (1e-5 if x0.dtype == torch.float64 else 1e-2)
    analytic, numeric = [], []
    for _ in range(directions):
        moves = [_noise(leaf, generator) * step * _scale(leaf) for leaf in leaves]
        analytic.append(sum(float((g * m).sum()) for g, m in zip(grads, moves, strict=True)) / step)
        with torch.no_grad():
            numeric.append(
                (_shifted(functional, leaves, moves, 1.0) - _shifted(functional, leaves, moves, -1.0)) / (2 * step)
            )
    # The rounding of a difference is no error.
    rounding = 1e2 * torch.finfo(x0.dtype).eps * float(value.detach().abs()) / step
    return _compare(analytic, numeric, tolerance, rounding)


def _compare(analytic: list[float], numeric: list[float], tolerance: float, rounding: float) -> GradientCheck:
    a, n = torch.tensor(analytic, dtype=torch.float64), torch.tensor(numeric, dtype=torch.float64)
    norms = float(a.norm() * n.norm())
    both_zero = float(a.norm()) == 0 and float(n.norm()) == 0
    cosine = 1.0 if both_zero else (float(a @ n) / norms if norms > 0 else 0.0)
    error = float((a - n).norm() - rounding) / max(float(n.norm()), 1e-300)
    return GradientCheck(tuple(analytic), tuple(numeric), cosine, max(error, 0.0), error <= tolerance)


def _shifted(functional: Callable[[], Tensor], leaves: list[Tensor], moves: list[Tensor], sign: float) -> float:
    """The value of the functional with every leaf moved. Afterwards the leaves are restored bit for bit."""
    saved = [leaf.detach().clone() for leaf in leaves]
    try:
        for leaf, move in zip(leaves, moves, strict=True):
            leaf.add_(sign * move)
        return float(functional())
    finally:
        for leaf, old in zip(leaves, saved, strict=True):
            leaf.copy_(old)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _scale(leaf: Tensor) -> float:
    size = float(leaf.detach().square().mean().sqrt())
    return size if size > 0 else 1.0


def _everything(objective: Objective, x0: Points) -> Tensor:
    """A number that depends on all that the objective and its constraints use."""
    if not isinstance(objective, Constrained):
        return objective.cost(x0).sum()
    return objective.plain.cost(x0).sum() + objective.constraints(x0, None).sum()


def _leaves(cost: Tensor) -> list[Tensor]:
    """Every leaf that requires a gradient in the graph of a number."""
    found: dict[int, Tensor] = {}
    queue, seen = [cost.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        queue.extend(parent for parent, _ in node.next_functions)
    return list(found.values())
