"""The linear system of the derivative of a solution with active constraints, as a dense matrix.

At an optimum with the active constraints g_A(x) = 0 and their multipliers λ, the derivative is a solve with

        K = [H  Jᵀ]      H = ∂²(J + λᵀg)/∂x²,   J = ∂g_A/∂x.
            [J  0 ]

H acts on the directions that keep the constraints only: with T the projection on them, d = T(T H T + I − T)⁻¹T v. No penalty
weight occurs, so the condition number is that of the problem, and single precision suffices. T is orthogonal in coordinates
scaled by the curvatures, in which badly scaled variables do not count.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from difftori.solver.lq import times_vector
from difftori.solver.newton import RAISED, Factor, curvature_units, factorise
from difftori.types import Hessians, PointFlags, Points


class ActiveFactor(NamedTuple):
    """K, factorised. `hessian` H and `tangent` T (B n n) and `inverse` J⁺ (B n M), all in coordinates multiplied by `unit` (B n).
    `factor`: T H T + I − T.
    """

    factor: Factor
    hessian: Hessians
    tangent: Hessians
    inverse: Tensor
    unit: Points

    def solve(self, v: Points) -> tuple[Points, Tensor]:
        """K⁻¹(v, 0): d (B n), which keeps the active constraints, and their multipliers (B M)."""
        v = v * self.factor.free / self.unit
        d = times_vector(self.tangent, self.factor.solve(times_vector(self.tangent, v)))
        rest = (v - times_vector(self.hessian, d)) * self.factor.free
        return d / self.unit, times_vector(self.inverse.transpose(-1, -2), rest)


def multipliers_of(v: Points, jacobian: Tensor, free: PointFlags) -> Tensor:
    """The multipliers y (B M) with the least ‖v − Jᵀy‖ on the free set (B n), for derivatives J (B M n), zero for inactive constraints."""
    return times_vector(_pseudo_inverse(jacobian * free.unsqueeze(-2)).transpose(-1, -2), v * free)


def factorise_active(hessian: Hessians, jacobian: Tensor, free: PointFlags, floor: float | None) -> ActiveFactor:
    """Factorise K, with derivatives `jacobian` (B M n) of the active constraints, zero for the others, on the free set (B n)."""
    finite = torch.isfinite(jacobian).flatten(1).all(-1) & torch.isfinite(hessian).flatten(1).all(-1)
    known = torch.where(finite[:, None, None], hessian, 0.0)
    normal = torch.where(finite[:, None, None], jacobian, 0.0) * free.unsqueeze(-2)
    unit = _units(known.abs(), normal.abs())
    scaled, normal = known / unit.unsqueeze(-1) / unit.unsqueeze(-2), normal / unit.unsqueeze(-2)
    inverse = _pseudo_inverse(normal)
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    tangent = identity - inverse @ normal
    tangent = 0.5 * (tangent + tangent.transpose(-1, -2))
    reduced = tangent @ scaled @ tangent + identity - tangent
    reduced = torch.where(finite[:, None, None], reduced, torch.nan)
    factor = factorise(reduced, free, floor, RAISED)
    return ActiveFactor(factor, scaled, tangent, inverse, unit)


def _units(hessian: Hessians, jacobian: Tensor) -> Points:
    """Units (B n) from the sizes of curvatures; those of variables without curvature follow, through the constraints, from the others."""
    unit, flat = curvature_units(hessian), hessian.amax(-1) == 0
    # In units of the other variables, the largest derivative of each constraint is 1.
    others = torch.where(flat.unsqueeze(-2), 0.0, jacobian / unit.unsqueeze(-2)).amax(-1, keepdim=True)
    wanted = torch.where(others > 0, jacobian / torch.where(others > 0, others, 1.0), 0.0).amax(-2)
    return torch.where(flat & (wanted > 0) & torch.isfinite(wanted), wanted, unit)


def _pseudo_inverse(jacobian: Tensor) -> Tensor:
    """J⁺ (B n M) of J (B M n). Constraints that depend on each other to working precision share their multiplier."""
    finite = torch.isfinite(jacobian).flatten(1).all(-1)[:, None, None]
    known = torch.where(finite, jacobian, 0.0)
    length = known.norm(dim=-1, keepdim=True)
    length = torch.where(length > torch.finfo(known.dtype).tiny, length, 1.0)
    inverse = torch.linalg.pinv(known / length, rtol=1e3 * torch.finfo(known.dtype).eps)
    return inverse / length.transpose(-1, -2)
