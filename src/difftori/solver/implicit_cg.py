"""The implicit derivative by conjugate gradients: H⁻¹v without a matrix, and a record of the rows that were not solved."""

from typing import Any

import torch
from torch import Tensor

from difftori.solver.interface import Problem
from difftori.solver.newton import conjugate_gradients
from difftori.types import PointFlags, Points, RowFlags


class InverseProducts:
    """v ↦ H⁻¹v on the free set at one point.

    `unsolved` (B): rows that any call so far did not solve, because the products were used up or the curvature was not
    positive. None before the first call. Rows that are not `usable` are never passed.
    """

    def __init__(self, problem: Problem, point: Points, free: PointFlags, products: int, tolerance: float):
        self.problem, self.point, self.free = problem, point, free
        self.products, self.tolerance = products, tolerance
        self.unsolved: RowFlags | None = None

    def __call__(self, v: Points) -> Points:
        """H⁻¹v, to the accuracy that the products allow."""
        solved = conjugate_gradients(self.problem, self.point, v, self.free, self.products, self.tolerance)
        unsolved = solved.unsolved(MAX_RESIDUAL)
        self.unsolved = unsolved if self.unsolved is None else self.unsolved | unsolved
        return solved.solution


MAX_RESIDUAL = 0.05
"""A row with a larger relative residual counts as not solved."""


class ImplicitCG(torch.autograd.Function):
    """Value 0. The derivative with respect to the gradient ∇J is −H⁻¹ on the free set, by conjugate gradients."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, solves: InverseProducts) -> Tensor:
        """Zeros."""
        ctx.solves = solves
        return torch.zeros_like(grad)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """−H⁻¹v."""
        return _SolveCG.apply(-outputs[0], ctx.solves), None


class _SolveCG(torch.autograd.Function):
    """H⁻¹v, which is linear in v and symmetric: its derivative is the same operation."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, solves: InverseProducts) -> Tensor:
        ctx.solves = solves
        return solves(v)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _SolveCG.apply(outputs[0], ctx.solves), None
