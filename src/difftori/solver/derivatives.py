"""First and second derivatives of an objective, row by row.

All second derivatives use reverse mode over reverse mode, because reverse over forward mode (a gradient of a jvp) is
silently wrong through torch's `layer_norm`.
Under `torch.compile` the same quantities are computed by `torch.func`, which the compiler can trace.
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

    With `create_graph=True` both can be differentiated with respect to x and every tensor that the objective closes over;
    with False (the default) both are detached.
    """
    with torch.set_grad_enabled(create_graph):
        closed = objective.value_and_grad(x)
    if closed is not None:
        cost, grad = check_cost(closed[0], x), closed[1]
        if grad.shape != x.shape:
            raise ObjectiveError(
                f"value_and_grad of {type(objective).__name__} returned a gradient of shape {tuple(grad.shape)} for x {tuple(x.shape)}. "
                "Fix: return one number per variable, (B n)."
            )
    elif torch.compiler.is_compiling():
        cost, grad = _functional_value_and_grad(objective, x)
    else:
        with torch.enable_grad():
            point = x if create_graph and x.requires_grad else x.detach().requires_grad_()
            cost = checked_cost(objective, point)
            grad = _gradient(cost, point, create_graph)
    return (cost, grad) if create_graph else (cost.detach(), grad.detach())


def checked_cost(objective: Objective, x: Points) -> Rows:
    """The cost, after checking that it is one number per row in the precision of x.

    Raises:
        ObjectiveError: the cost has another shape than (B), or another dtype than x.
    """
    return check_cost(objective.cost(x), x)


def check_cost(cost: Any, x: Points) -> Rows:
    """Check that the return value of an objective is a cost for x, and return it."""
    if not isinstance(cost, Tensor):
        raise ObjectiveError(
            f"the objective returned a {type(cost).__name__}, not a tensor of shape ({x.shape[0]},) with one cost per row. "
            "Fix: compute the cost with torch functions; numpy has no gradients."
        )
    if cost.shape != x.shape[:1]:
        raise ObjectiveError(
            f"the objective returned shape {tuple(cost.shape)} for x {tuple(x.shape)}, not one cost per row, ({x.shape[0]},). "
            "Fix: sum over the variables, not over the rows: for example `.sum(-1)`."
        )
    if cost.dtype != x.dtype:
        raise ObjectiveError(
            f"the objective returned {cost.dtype} for x in {x.dtype}, which would mix precisions. Fix: convert x0 and all "
            f"tensors of the objective to one dtype, for example x0.to({cost.dtype})."
        )
    if cost.device != x.device:
        raise ObjectiveError(
            f"the objective returned a cost on {cost.device} for x on {x.device}. Fix: move x0, or the tensors of the objective."
        )
    return cost


def _gradient(cost: Rows, x: Points, create_graph: bool) -> Points:
    message = (
        "the cost does not depend on x, so there is nothing to optimise. Fix: compute it from the argument of the objective, "
        "without .detach(), .item(), .numpy(), torch.no_grad() or rounding."
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
    """The value of the function, and v ↦ vᵀ ∂function/∂at. It can be nested, vmapped and compiled."""
    value, pull = cast(Any, torch.func.vjp(function, at))
    return value, lambda v: pull(v)[0]


def unit_vectors(like: Tensor, size: int) -> Tensor:
    """The unit vectors for every row, (size B size): one pullback of each gives the Jacobian of every row."""
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return eye[:, None].expand(size, like.shape[0], size)


def row_jacobian(y: Tensor, x: Tensor, create_graph: bool = False) -> Tensor:
    """The derivative d y[…, p] / d x[…, q] of outputs y (… p) that depend on x (… q) row by row: (… p q), by p batched products."""
    p = y.shape[-1]
    basis = torch.eye(p, dtype=y.dtype, device=y.device).view(p, *(1,) * (y.dim() - 1), p).expand(p, *y.shape)
    if not y.requires_grad:
        return y.new_zeros(*y.shape, x.shape[-1])
    (rows,) = torch.autograd.grad(
        y, x, basis, is_grads_batched=True, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return y.new_zeros(*y.shape, x.shape[-1]) if rows is None else rows.movedim(0, -2)


def value_grad_hessian(objective: Objective, x: Points, create_graph: bool = False) -> tuple[Rows, Points, Hessians]:
    """Cost, gradient and dense Hessian per row. The Hessian costs n Hessian-vector products, batched into one call."""
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
    costs = objective.costs(candidates)
    if costs is not None:
        return costs
    return torch.func.vmap(lambda x: checked_cost(objective, x), randomness="same")(candidates)
