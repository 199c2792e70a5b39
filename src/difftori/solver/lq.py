"""Linear-quadratic models of trajectories: linearisation along a trajectory, and backward (Riccati) sweeps.

    min over δa   Σ_t ½ [δs δa] C_t [δs δa]ᵀ + c_t·[δs δa]  + ½ δs_H C_H δs_H + c_H·δs_H,    δs_{t+1} = F_t [δs_t δa_t]

`ILQR` computes its steps from such models, and the implicit gradient solves its linear system with one (kkt.py). S states,
A actions, N = S + A; rows first, then time. Every operation costs O(H).

The sweep uses homogeneous coordinates (δs, 1): value function, linear terms and constants form one symmetric matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from difftori.solver.compiled import compiled_call, loop
from difftori.solver.derivatives import pullback, unit_vectors
from difftori.solver.objective import TrajectoryObjective
from difftori.types import Plans, Points, RowFlags, Rows


class LQModel(NamedTuple):
    """Derivatives along a trajectory, with discounts. Rows first.

    `jacobian` F (B H S N); `gradient` (B H N) and `hessian` (B H N N) of the stage costs; `terminal_gradient` (B S),
    `terminal_hessian` (B S S).
    """

    jacobian: Tensor
    gradient: Tensor
    hessian: Tensor
    terminal_gradient: Tensor
    terminal_hessian: Tensor


def linearise(objective: TrajectoryObjective, states: Tensor, plan: Plans) -> LQModel:
    """The model along states (B H+1 S) and actions (B H A): exact Jacobians, gradients and Hessians of the costs.

    The derivatives of all steps are computed at once, so the time per step does not grow with the horizon.
    """
    size, width = states.shape[-1], states.shape[-1] + plan.shape[-1]
    state_basis, basis = unit_vectors(states, size), unit_vectors(states, width)

    def at(state: Tensor, action: Tensor, t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pair = torch.cat([state, action], -1)
        following, pull = pullback(lambda z: objective.next(z[..., :size], z[..., size:], t), pair)
        jacobian = vmap(pull)(state_basis)
        gradient, pull_gradient = pullback(
            lambda z: weight * _gradient(lambda y: objective.stage_cost(y[..., :size], y[..., size:], t), z), pair
        )
        return jacobian, gradient, vmap(pull_gradient)(basis)

    weights = discounts(objective, states)
    jacobian, gradient, hessian = vmap(at, in_dims=(1, 1, 0, 0), randomness="same")(
        states[:, :-1], plan, objective.times(), weights[:-1]
    )
    last, pull_last = pullback(lambda s: weights[-1] * _gradient(objective.terminal_cost, s), states[:, -1])
    terminal = vmap(pull_last)(state_basis)
    parts = (
        jacobian.permute(2, 0, 1, 3),
        gradient.movedim(0, 1),
        hessian.permute(2, 0, 1, 3),
        last,
        terminal.movedim(0, 1),
    )
    return LQModel(*parts)


class Defined(NamedTuple):
    """A model without NaN, and the states (B H+1 S) and actions (B H A) at which its Hessians were taken."""

    model: LQModel
    states: Tensor
    plan: Plans


def defined(model_at: Callable[[Tensor, Tensor], LQModel], states: Tensor, plan: Plans) -> Defined:
    """The model at states (B H+1 S) and actions (B H A). Hessians that are NaN there are those of a point a small distance away.

    PyTorch's second derivative of a norm at zero is NaN, also in v‖v‖, the drag of a body at rest, where it is bounded but has no limit.
    """
    model = model_at(states, plan)
    finite = torch.isfinite(model.hessian).flatten(2).all(-1)
    last = torch.isfinite(model.terminal_hessian).flatten(1).all(-1)
    if bool(finite.all() & last.all()):
        return Defined(model, states, plan)
    beside, actions = _aside(states), _aside(plan)
    near = model_at(beside, actions)
    hessian = torch.where(finite[..., None, None], model.hessian, near.hessian)
    terminal = torch.where(last[:, None, None], model.terminal_hessian, near.terminal_hessian)
    kept = torch.cat([finite, last.unsqueeze(1)], 1).unsqueeze(-1)
    return Defined(
        model._replace(hessian=hessian, terminal_hessian=terminal),
        torch.where(kept, states, beside),
        torch.where(kept[:, :-1], plan, actions),
    )


def _aside(x: Tensor) -> Tensor:
    """Points a relative distance √ε away, in a direction without symmetry."""
    direction = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device).cos()
    return x + torch.finfo(x.dtype).eps ** 0.5 * x.detach().abs().clamp(min=1.0) * direction


def costs(objective: TrajectoryObjective, states: Tensor, plan: Plans) -> Rows:
    """The discounted cost of given states (B H+1 S) and actions (B H A), without a rollout, (B)."""
    weights = discounts(objective, states)
    stages = vmap(objective.stage_cost, in_dims=(1, 1, 0), randomness="same")(states[:, :-1], plan, objective.times())
    return (stages * weights[:-1, None]).sum(0) + weights[-1] * objective.terminal_cost(states[:, -1])


def costates(model: LQModel, feedback: Tensor) -> tuple[Tensor, Plans]:
    """λ_t, the derivative of the cost with respect to s_t (B H+1 S), and with respect to the actions, c_a + F_aᵀλ_{t+1} (B H A).

    Later actions respond to the state through `feedback` K (B H A S): λ_t = q_s + K_tᵀ q_a. At optimal actions q_a is zero,
    so the feedback makes no difference there. With feedback, an error decays on its way back; without it, unstable dynamics
    amplify it. K = 0 gives the gradient of the open loop.
    """
    size = model.terminal_gradient.shape[-1]

    def back(carry: tuple[Tensor], step: tuple[Tensor, ...]) -> tuple[tuple[Tensor], tuple[Tensor, Tensor]]:
        (costate,), (transposed, gradient, gain) = carry, step
        q = gradient + times_vector(transposed, costate)
        costate = q[:, :size] + times_vector(gain.transpose(-1, -2), q[:, size:])
        return (costate,), (costate, q[:, size:])

    steps = (model.jacobian.transpose(-1, -2), model.gradient, feedback)
    _, found = loop(back, (model.terminal_gradient,), tuple(part.movedim(1, 0).flip(0) for part in steps))
    costate, action = (part.flip(0).movedim(0, 1) for part in found)
    return torch.cat([costate, model.terminal_gradient.unsqueeze(1)], 1), action


def with_dynamics_curvature(
    objective: TrajectoryObjective, states: Tensor, plan: Plans, model: LQModel, costate: Tensor
) -> LQModel:
    """The same model with λ_{t+1}ᵀ ∂²next added to the Hessians: those of the Lagrangian, exact at a stationary point."""
    size, width = states.shape[-1], states.shape[-1] + plan.shape[-1]
    basis = unit_vectors(states, width)

    def at(state: Tensor, action: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        def gradient(pair: Tensor) -> Tensor:
            _, pull = pullback(lambda z: objective.next(z[..., :size], z[..., size:], t), pair)
            return pull(weight)

        pair = torch.cat([state, action], -1)
        _, pull = pullback(gradient, pair)
        # Directions of every step: torch's layer normalisation adds second derivatives in place, to a tensor of the directions' size.
        return vmap(lambda direction: pull(direction + torch.zeros_like(pair)))(basis)

    bends = vmap(at, in_dims=(1, 1, 0, 1), randomness="same")(states[:, :-1], plan, objective.times(), costate[:, 1:])
    return model._replace(hessian=model.hessian + bends.permute(2, 0, 1, 3))


def convexified(model: LQModel, floor: float, units: Points | None = None) -> LQModel:
    """The same model with the eigenvalues of every Hessian raised to `floor` × the largest curvature of its row.

    `units` (B H·A): the units of the actions in which eigenvalues are compared; default: those of the task. They are used only as far
    as the curvature of an action in its unit is at most the largest of the row, because a bound may be loose. Only the Hessians that
    need it are decomposed. The added part is treated as a constant in derivatives.
    """
    hessian, last = model.hessian, model.terminal_hessian
    scaled, back = hessian.detach(), None
    if units is not None:
        states = torch.ones_like(scaled[..., : last.shape[-1], 0])
        most = scaled.abs().amax((1, 2, 3)).maximum(last.detach().abs().amax((1, 2)))[:, None, None]
        own = scaled.diagonal(dim1=-1, dim2=-2)[..., last.shape[-1] :].abs()
        widest = torch.where(own > 0, (most / own).sqrt(), torch.inf)
        back = torch.cat([states, units.view_as(own).minimum(widest.clamp_min(1.0))], -1)
        scaled = scaled * back.unsqueeze(-1) * back.unsqueeze(-2)
        back = back.flatten(0, 1)
    least = floor * scaled.abs().amax((1, 2, 3)).maximum(last.detach().abs().amax((1, 2)))
    every = least.repeat_interleave(hessian.shape[1])
    hessian = _convex(hessian.flatten(0, 1), scaled.flatten(0, 1), back, every).view_as(hessian)
    return model._replace(hessian=hessian, terminal_hessian=_convex(last, last.detach(), None, least))


def _convex(matrices: Tensor, scaled: Tensor, units: Tensor | None, floor: Tensor) -> Tensor:
    """Matrices whose eigenvalues in units (M N) are raised to the floor (M). `scaled`: the matrices in units, without a graph."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    finite = torch.isfinite(scaled).flatten(1).all(-1)
    _, failed = torch.linalg.cholesky_ex(
        torch.where(finite[:, None, None], scaled, identity) - floor[:, None, None] * identity
    )
    rows = ((failed != 0) & finite & torch.isfinite(floor)).nonzero().squeeze(-1)
    if len(rows) == 0:
        return matrices
    values, vectors = torch.linalg.eigh(scaled[rows])
    raised = (values.maximum(floor[rows, None]) - values).unsqueeze(-2)
    if units is not None:
        vectors = vectors / units[rows].unsqueeze(-1)
    return matrices.index_add(0, rows, (vectors * raised) @ vectors.transpose(-1, -2))


class Sweep(NamedTuple):
    """The result of a backward sweep.

    `gains` [K_t k_t] (B H A S+1): δa_t = K_t δs_t + α k_t. `slope` (B): the derivative of the cost along α at 0 in the model;
    `bend` (B): its second derivative. `newton` (B H A): the change of each action by a Newton step with its own curvature only.
    `convex` (B): the curvature of the actions is positive definite at every step.
    """

    gains: Tensor
    slope: Rows
    bend: Rows
    newton: Plans
    convex: RowFlags


def homogeneous(model: LQModel) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamics (B H S+1 N+1), stage costs (B H N+1 N+1) and the last value (B S+1 S+1), ordered (δs, 1, δa)."""
    size = model.terminal_gradient.shape[-1]
    f, g, h = model.jacobian, model.gradient, model.hessian
    zero = f.new_zeros(*f.shape[:-1], 1)
    dynamics = torch.cat([f[..., :size], zero, f[..., size:]], -1)
    constant = f.new_zeros(*f.shape[:2], 1, dynamics.shape[-1])
    constant[..., size] = 1.0
    dynamics = torch.cat([dynamics, constant], -2)
    column = torch.cat([g[..., :size], f.new_zeros(*g.shape[:-1], 1), g[..., size:]], -1).unsqueeze(-1)
    stage = torch.cat([h[..., :size, :], h.new_zeros(*h.shape[:2], 1, h.shape[-1]), h[..., size:, :]], -2)
    without = column * torch.ones_like(column).index_fill(-2, torch.tensor([size], device=f.device), 0.0)
    stage = torch.cat([stage[..., :size], column, stage[..., size:]], -1)
    stage = torch.cat([stage[..., :size, :], without.transpose(-1, -2), stage[..., size + 1 :, :]], -2)
    last = torch.cat([model.terminal_hessian, model.terminal_gradient.unsqueeze(-1)], -1)
    foot = torch.cat([model.terminal_gradient, torch.zeros_like(model.terminal_gradient[:, :1])], -1)
    return dynamics, stage, torch.cat([last, foot.unsqueeze(-2)], -2)


def sweep(model: LQModel, low: Plans, high: Plans, damping: Rows, compile: bool = False) -> Sweep:
    """Gains that minimise the model with low ≤ δa_t ≤ high (B H A) on the nominal path, from the last step to the first.

    The feedback acts on the actions without an active bound. `damping` (B) is relative: diag(H_aa) is multiplied by 1 + damping.
    """
    if not compile:
        return _sweep(model, low, high, damping, False)
    lean = low.device.type == "cpu"
    # Bounded actions of more than one dimension take several iterations each; most sweeps need none of them.
    several = low.shape[-1] > 1
    found = compiled_call(_sweep, model, low, high, damping, several, lean=lean)
    inside = (found.gains[..., -1] >= low) & (found.gains[..., -1] <= high)
    if several and not bool(inside.all() & found.convex.all()):
        found = compiled_call(_sweep, model, low, high, damping, False, lean=lean)
    return found


def _sweep(model: LQModel, low: Plans, high: Plans, damping: Rows, unbounded: bool) -> Sweep:
    dynamics, stage, value = homogeneous(model)
    size = value.shape[-1]
    identity = torch.eye(size, dtype=stage.dtype, device=stage.device).expand(stage.shape[0], -1, -1)

    def back(carry: tuple[Tensor], step: tuple[Tensor, ...]) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
        (value,), (f, c, low, high) = carry, step
        q = c + _product(_product(f.transpose(-1, -2), value), f)
        h, b = q[:, size:, size:], q[:, size:, :size]
        gain, sound = control(h, b, low, high, damping, unbounded)
        embed = torch.cat([identity, gain], -2)
        return (_product(_product(embed.transpose(-1, -2), q), embed),), (
            gain,
            b[..., -1],
            h.diagonal(dim1=-1, dim2=-2),
            sound,
        )

    damping = 1 + damping
    steps = tuple(part.movedim(1, 0).flip(0) for part in (dynamics, stage, low, high))
    (value,), found = loop(back, (value,), steps)
    gains, linear, curvature, convex = (part.flip(0).movedim(0, 1) for part in found)
    slope = (gains[..., -1] * linear).sum((1, 2))
    alone = torch.minimum(torch.maximum(-linear / _positive(curvature), low), high)
    return Sweep(gains, slope, value[:, -1, -1] - 2 * slope, alone, convex.all(-1))


def control(
    h: Tensor, b: Tensor, low: Tensor, high: Tensor, damping: Rows, unbounded: bool = False
) -> tuple[Tensor, RowFlags]:
    """[K k] (B A S+1) of min ½ kᵀh k + b₁ᵀk over low ≤ k ≤ high (B A), by projected Newton; K on the free set.

    `damping` (B) multiplies the diagonal of h. Also returns which h are positive definite on the free set (B): bounds may hold
    actions of negative curvature.
    """
    if h.shape[-1] == 1:
        request = b / (h * damping[:, None, None]).neg().clamp_max(-(torch.finfo(h.dtype).tiny ** 0.5))
        last = request[..., -1:]
        k = last.clamp(low.unsqueeze(-1), high.unsqueeze(-1))
        slope = b[:, 0, -1:]
        held = ((low >= 0) & (slope > 0)) | ((high <= 0) & (slope < 0))
        return torch.cat([request[..., :-1] * (k == last), k], -1), (h[:, 0, 0] > 0) | held[:, 0]
    h = h + torch.diag_embed(_positive(h.diagonal(dim1=-1, dim2=-2)) * (damping - 1)[:, None])
    request, sound = _solve(h, -b)
    if unbounded:
        return request, sound
    if not torch.compiler.is_compiling():
        inside = ((request[..., -1] >= low) & (request[..., -1] <= high)).all(-1)
        if bool((inside & sound).all()):
            return request, sound
    return _bounded_control(h, b, low, high)


def _solve(h: Tensor, b: Tensor) -> tuple[Tensor, RowFlags]:
    """h⁻¹ b, and which h (B A A) are positive definite. If compiled, up to 6 actions are eliminated in plain arithmetic."""
    if not torch.compiler.is_compiling() or h.shape[-1] > 6:
        factor, failed = torch.linalg.cholesky_ex(h)
        return torch.cholesky_solve(b, factor), failed == 0
    size = h.shape[-1]
    rows = [torch.cat([h[:, i], b[:, i]], -1) for i in range(size)]
    sound = torch.ones_like(h[:, 0, 0], dtype=torch.bool)
    for i in range(size):
        pivot = rows[i][:, i : i + 1]
        sound = sound & (pivot[:, 0] > 0)
        rows[i] = rows[i] / torch.where(pivot > 0, pivot, 1.0)
        for j in range(size):
            if j != i:
                rows[j] = rows[j] - rows[j][:, i : i + 1] * rows[i]
    return torch.stack([row[:, size:] for row in rows], 1), sound


def _bounded_control(h: Tensor, b: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, RowFlags]:
    """[K k] within the bounds, and which h are positive definite on the free set at k."""
    identity = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    eps = torch.finfo(h.dtype).eps
    h = h + eps * torch.diag_embed(_positive(h.diagonal(dim1=-1, dim2=-2)))
    k, right = torch.zeros_like(low), b[..., -1]
    free = torch.ones_like(k, dtype=torch.bool)
    compiling = torch.compiler.is_compiling()
    for _ in range(_QP_ITERATIONS):
        grad = right + (h @ k.unsqueeze(-1)).squeeze(-1)
        free = ~(((k <= low) & (grad > 0)) | ((k >= high) & (grad < 0)))
        move, sound = _solve(_on(free, h, identity), (grad * free).unsqueeze(-1))
        move = torch.where(sound[:, None], move.squeeze(-1) * free, 0.0)
        moved = torch.minimum(torch.maximum(k - move, low), high)
        still = not compiling and bool(((moved - k).abs() <= 4 * eps * k.abs()).all())
        k = moved
        if still:
            break
    feedback, sound = _solve(_on(free, h, identity), b[..., :-1] * free.unsqueeze(-1))
    feedback = torch.where(sound[:, None, None], -feedback * free.unsqueeze(-1), 0.0)
    return torch.cat([feedback, k.unsqueeze(-1)], -1), sound


def _on(free: Tensor, matrix: Tensor, identity: Tensor) -> Tensor:
    """The matrix on the free set, the identity elsewhere."""
    return torch.where(free.unsqueeze(-1) & free.unsqueeze(-2), matrix, identity)


_QP_ITERATIONS = 8


def times_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrices (… p q) times vectors (… q)."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b. If compiled, small matrices are multiplied in plain arithmetic, which the compiler can fuse with other operations."""
    if torch.compiler.is_compiling() and max(*a.shape[-2:], b.shape[-1]) <= 8:
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
    return a @ b


def _positive(curvature: Tensor) -> Tensor:
    return curvature.abs().clamp_min(torch.finfo(curvature.dtype).tiny ** 0.5)


def discounts(objective: TrajectoryObjective, like: Tensor) -> Tensor:
    """γ^t for t = 0 … H, (H+1)."""
    steps = torch.arange(objective.horizon + 1, dtype=like.dtype, device=like.device)
    return objective.discount**steps


def _gradient(function, at: Tensor) -> Tensor:
    value, pull = pullback(function, at)
    return pull(torch.ones_like(value))
