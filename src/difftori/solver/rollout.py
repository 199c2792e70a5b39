"""Closed-loop rollouts of several step lengths at once: the line search of `ILQR`."""

import torch
from torch import Tensor
from torch.func import vmap

from difftori.solver.compiled import loop, maybe_compiled
from difftori.solver.lq import costs, times_vector
from difftori.solver.objective import TrajectoryObjective
from difftori.types import Plans


def roll(
    objective: TrajectoryObjective,
    states: Tensor,
    plan: Plans,
    gains: Tensor,
    low: Plans,
    high: Plans,
    lengths: Tensor,
    compile: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-loop rollouts a_t = P(a_t + α k_t + K_t(s_t − nominal)) for L lengths α.

    Returns states (L B H+1 S), actions (L B H A) and costs (L B).
    """
    arguments = (objective, states, plan, gains, low, high, lengths)
    return maybe_compiled(compile, _roll_all, *arguments, lean=plan.device.type == "cpu")


def _roll_all(
    objective: TrajectoryObjective, states: Tensor, plan: Plans, gains: Tensor, low: Plans, high: Plans, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    count, rows = len(lengths), plan.shape[0]
    feedback = gains[..., :-1]
    request = plan + lengths[:, None, None, None] * gains[..., -1] - times_vector(feedback, states[:, :-1])
    start = states[:, 0].expand(count, *states[:, 0].shape)
    others = (feedback, low, high)
    folded = None if torch.compiler.is_compiling() else _folded(objective, start, plan[:, 0])
    if folded is None:
        next_state, actions = _roll_each(objective, start, request, others)
    else:
        every = tuple(part.repeat(count, *(1,) * (part.dim() - 1)) for part in others)
        next_state, actions = _roll(folded, start.flatten(0, 1), request.flatten(0, 1), every)
        next_state, actions = next_state.unflatten(0, (count, rows)), actions.unflatten(0, (count, rows))
    found = torch.cat([start.unsqueeze(2), next_state], 2)
    return found, actions, vmap(lambda s, a: costs(objective, s, a), randomness="same")(found, actions)


def _roll_each(objective: TrajectoryObjective, start: Tensor, request: Tensor, others: tuple) -> tuple[Tensor, Tensor]:
    """Rollouts of L sets of requested actions (L B H A) from (L B S)."""

    def forth(carry: tuple[Tensor], step: tuple[Tensor, ...]) -> tuple[tuple[Tensor], tuple[Tensor, Tensor]]:
        (state,), (request, *rest) = carry, step
        each = vmap(lambda s, w: _step(objective, s, w, *rest), randomness="same")
        next_state, action = each(state, request)
        return (next_state,), (next_state, action)

    steps = (request.movedim(2, 0), *(part.movedim(1, 0) for part in others), objective.times())
    _, (next_state, actions) = loop(forth, (start,), steps)
    return next_state.movedim(0, 2), actions.movedim(0, 2)


def _roll(objective: TrajectoryObjective, start: Tensor, request: Tensor, others: tuple) -> tuple[Tensor, Tensor]:
    """One rollout of requested actions (B H A) from (B S)."""

    def forth(carry: tuple[Tensor], step: tuple[Tensor, ...]) -> tuple[tuple[Tensor], tuple[Tensor, Tensor]]:
        next_state, action = _step(objective, *carry, *step)
        return (next_state,), (next_state, action)

    steps = tuple(part.movedim(1, 0) for part in (request, *others))
    _, (next_state, actions) = loop(forth, (start,), (*steps, objective.times()))
    return next_state.movedim(0, 1), actions.movedim(0, 1)


def _step(objective, state, request, gain, low, high, t) -> tuple[Tensor, Tensor]:
    """The next state and the action that led to it: a requested action plus feedback, within the bounds."""
    action = torch.baddbmm(request.unsqueeze(-1), gain, state.unsqueeze(-1)).squeeze(-1).clamp(low, high)
    return objective.next(state, action, t), action


def _folded(objective: TrajectoryObjective, state: Tensor, action: Tensor) -> TrajectoryObjective | None:
    """The objective on L·B rows, which repeat the same B rows L times, or None if the dynamics do not support it.

    Dynamics may close over per-row data, which cannot be repeated. They are therefore tested on one step. `vmap` supports
    any dynamics and takes twice the time.
    """
    count, rows = state.shape[:2]
    many = objective.select(torch.arange(rows, device=state.device).repeat(count))
    if not isinstance(many, TrajectoryObjective):
        return None
    t = objective.times()[0]
    with torch.no_grad():
        expected = objective.next(state[0], action, t)
        try:
            got = many.next(state.flatten(0, 1), action.repeat(count, 1), t)
        except (RuntimeError, ValueError, IndexError):
            return None
        if got.shape != (count * rows, expected.shape[-1]):
            return None
        close = torch.isclose(got.unflatten(0, (count, rows)), expected, rtol=1e-3, atol=1e-6, equal_nan=True)
    return many if bool(close.all()) else None
