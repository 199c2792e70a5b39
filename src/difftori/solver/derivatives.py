"""First and second derivatives of an objective, row by row.

Everything is reverse mode over reverse mode: reverse-over-forward (a gradient of a jvp) is silently wrong through
torch's `layer_norm`.
Under `torch.compile` the same quantities come from `torch.func`, which the compiler can trace.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from difftori.errors import ObjectiveError
from difftori.solver.objective import Objective
from difftori.types import Hessians, Points, Rows


def value_and_grad(objective: Objective, x: Points, create_graph: bool = False) -> tuple[Rows, Points]:
    """Cost and its gradient, in one forward and one backward pass.

    With `create_graph` both are differentiable in x and in all that the objective closes over; without it neither is.
    """
    if torch.compiler.is_compiling():
        cost, grad = _functional_value_and_grad(objective, x)
        return (cost, grad) if create_graph else (cost.detach(), grad.detach())
    with torch.enable_grad():
        point = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        cost = checked_cost(objective, point)
        grad = _gradient(cost, point, create_graph)
    return (cost, grad) if create_graph else (cost.detach(), grad)


def checked_cost(objective: Objective, x: Points) -> Rows:
    """The cost, after a check that it is one number per row, in the precision of x.

    Raises:
        ObjectiveError: the cost has another shape than (B), or another dtype than x.
    """
    return check_cost(objective.cost(x), x)


def check_cost(cost: Any, x: Points) -> Rows:
    """What an objective returned for x, if it is a cost."""
    if not isinstance(cost, Tensor):
        raise ObjectiveError(
            f"the objective returned a {type(cost).__name__}; it must return a tensor of shape ({x.shape[0]},), one cost per "
            "row, computed by torch functions: numpy leaves no gradient."
        )
    if cost.shape != x.shape[:1]:
        raise ObjectiveError(
            f"the objective returned {tuple(cost.shape)} for x {tuple(x.shape)}; it must return one cost per row, shape ({x.shape[0]},). "
            "Sum over the variables, not over the rows: for example `.sum(-1)`."
        )
    if cost.dtype != x.dtype:
        raise ObjectiveError(
            f"the objective returned {cost.dtype} for x in {x.dtype}: the solve would run in a mixture of both. Bring x0 "
            f"and all that the objective uses to one of them, for example x0.to({cost.dtype})."
        )
    if cost.device != x.device:
        raise ObjectiveError(
            f"the objective returned a cost on {cost.device} for x on {x.device}. Fix: move x0, or what the objective uses."
        )
    return cost


def _gradient(cost: Rows, x: Points, create_graph: bool) -> Points:
    message = (
        "the cost does not depend on x: nothing to optimise. Compute it from the tensor that the objective is given, "
        "without .detach(), .item(), .numpy(), torch.no_grad() or rounding in between."
    )
    if not cost.requires_grad:
        raise ObjectiveError(message)
    (grad,) = torch.autograd.grad(cost.sum(), x, create_graph=create_graph, allow_unused=True)
    if grad is None:
        raise ObjectiveError(message)
    return grad


def _functional_value_and_grad(objective: Objective, x: Points) -> tuple[Rows, Points]:
    def total(point):
        cost = objective.cost(point)
        return cost.sum(), cost

    grad, cost = torch.func.grad(total, has_aux=True)(x)
    return cost, grad


def pullback(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The function's value, and v ↦ vᵀ ∂function/∂at. Can be nested, vmapped and compiled."""
    value, pull = cast(Any, torch.func.vjp(function, at))
    return value, lambda v: pull(v)[0]


def unit_vectors(like: Tensor, size: int) -> Tensor:
    """A basis for every row, (size B size): one pullback of each gives every row's Jacobian."""
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return eye[:, None].expand(size, like.shape[0], size)


def row_jacobian(y: Tensor, x: Tensor, create_graph: bool = False) -> Tensor:
    """The derivative d y[…, p] / d x[…, q] for outputs y (… p) that depend on x (… q) row by row: (… p q), by p batched products."""
    p = y.shape[-1]
    basis = torch.eye(p, dtype=y.dtype, device=y.device).view(p, *(1,) * (y.dim() - 1), p).expand(p, *y.shape)
    if not y.requires_grad:
        return y.new_zeros(*y.shape, x.shape[-1])
    (rows,) = torch.autograd.grad(
        y, x, basis, is_grads_batched=True, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return y.new_zeros(*y.shape, x.shape[-1]) if rows is None else rows.movedim(0, -2)


def value_grad_hessian(objective: Objective, x: Points, create_graph: bool = False) -> tuple[Rows, Points, Hessians]:
    """Cost, gradient and dense Hessian per row; the Hessian costs n Hessian-vector products, batched into one."""
    if torch.compiler.is_compiling():
        return _functional_value_grad_hessian(objective, x)
    with torch.enable_grad():
        point = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        cost, grad = value_and_grad(objective, point, create_graph=True)
        hessian = row_jacobian(grad, point, create_graph)
    if create_graph:
        return cost, grad, hessian
    return cost.detach(), grad.detach(), hessian.detach()


def _functional_value_grad_hessian(objective: Objective, x: Points) -> tuple[Rows, Points, Hessians]:
    def gradient(point):
        cost, grad = _functional_value_and_grad(objective, point)
        return grad, cost

    grad, pullback, cost = cast(Any, torch.func.vjp(gradient, x, has_aux=True))
    basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)[:, None].expand(-1, *x.shape)
    hessian = torch.func.vmap(pullback)(basis.contiguous())[0].movedim(0, -2)
    return cost.detach(), grad.detach(), hessian.detach()


def costs_of_candidates(objective: Objective, candidates: Tensor) -> Tensor:
    """Costs (K B) of K candidates for every row, (K B n), in one batched evaluation."""
    return torch.func.vmap(lambda x: checked_cost(objective, x), randomness="same")(candidates)
