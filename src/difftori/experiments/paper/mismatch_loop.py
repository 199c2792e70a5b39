"""The closed loop of a planner and the true system, its gradients, and data from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from difftori.errors import NonFiniteError
from difftori.experiments.paper.mismatch_systems import System
from difftori.models.nets import noise_like
from difftori.planning import plan
from difftori.solver import Status

_FIRST_GUESS, _COLD_STEPS, _WARM_STEPS, _TOLERANCE = 0.01, 60, 8, 1e-3
_NOISE, _PROCESS_NOISE = 0.1, 0.02
"""Exploration in units of the largest force, and disturbance of the velocities (m/s, rad/s), standard deviations."""


@dataclass(frozen=True)
class Rollout:
    """A closed loop of T steps in B rows: states (B T+1 S), planned and executed actions (B T 1), rewards (B T).

    `by_parameters` (B T P) and `by_state` (B T S) are the derivatives of the planned action; zero where the planner's gradient
    is not valid, which `valid` (B T) tells.
    """

    states: Tensor
    planned: Tensor
    executed: Tensor
    rewards: Tensor
    by_parameters: Tensor
    by_state: Tensor
    valid: Tensor

    @property
    def costs(self) -> Tensor:
        """Minus the sum of the rewards (B)."""
        return -self.rewards.sum(1)


@dataclass(frozen=True)
class Closed:
    """The loop of planner and true system: its friction, the planner's horizon H, and T steps per episode.

    `known`: the friction in the planner's model; 0 but for the reference that knows the true system.
    """

    system: System
    friction: float
    horizon: int
    steps: int
    known: float = 0.0

    def run(
        self, logs: Tensor, starts: Tensor, *, noise: torch.Generator | None = None, gradient: bool = False
    ) -> Rollout:
        """Run the loop for parameters (B P) from `starts` (B S). `noise`: adds exploration and disturbances from it.

        Raises NonFiniteError if a plan is NaN or Inf.
        """
        system, true = self.system, self.system.dynamics(self.system.logs, self.friction)
        actions = starts.new_full((len(starts), self.horizon, 1), _FIRST_GUESS)
        state, track = starts, []
        for step in range(self.steps):
            theta, seen = logs.detach().requires_grad_(gradient), state.detach().requires_grad_(gradient)
            found = plan(
                system.dynamics(theta, self.known),
                system.reward,
                system.terminal_value,
                seen,
                actions,
                -system.bound,
                system.bound,
                max_steps=_WARM_STEPS if step else _COLD_STEPS,
                tolerance=_TOLERANCE,
            )
            if bool((found.solution.status == Status.NON_FINITE).any()):
                raise NonFiniteError(f"{system.name}, friction {self.friction:g}: a plan at step {step} is NaN or Inf")
            planned, valid = found.actions[:, 0], found.solution.gradient_valid
            slopes = (torch.zeros_like(theta), torch.zeros_like(seen))
            if gradient:
                slopes = tuple(slope * valid[:, None] for slope in torch.autograd.grad(planned.sum(), (theta, seen)))
            planned, executed = planned.detach(), planned.detach()
            if noise is not None:
                executed = executed + _NOISE * system.bound * noise_like(executed, noise)
                executed = executed.clamp(-system.bound, system.bound)
            track.append((state, planned, executed, system.reward(state, executed), *slopes, valid))
            state = true(state, executed)
            if noise is not None:
                half = state.shape[1] // 2
                state = torch.cat(
                    (state[:, :half], state[:, half:] + _PROCESS_NOISE * noise_like(state[:, half:], noise)), 1
                )
            actions = torch.cat((found.actions.detach()[:, 1:], found.actions.detach()[:, -1:]), 1)
        states, *others = (torch.stack(part, 1) for part in zip(*track, strict=True))
        return Rollout(torch.cat((states, state[:, None]), 1), *others)

    def return_gradient(self, rollout: Rollout) -> Tensor:
        """The derivative (B P) of the closed loop's cost by the parameters, through the true dynamics and the planner."""
        true = self.system.dynamics(self.system.logs, self.friction)
        sensitivity = rollout.by_state.new_zeros(*rollout.by_state[:, 0].shape, rollout.by_parameters.shape[-1])
        total = torch.zeros_like(rollout.by_parameters[:, 0])
        for step in range(self.steps):
            state = rollout.states[:, step].detach().requires_grad_()
            action = rollout.executed[:, step].detach().requires_grad_()
            by_state, by_action = row_jacobians(true(state, action), state, action)
            cost = -self.system.reward(state, action)
            cost_by_state, cost_by_action = row_jacobians(cost[:, None], state, action)
            moved = rollout.by_parameters[:, step, None] + rollout.by_state[:, step, None] @ sensitivity
            total = total + (cost_by_state @ sensitivity + cost_by_action @ moved)[:, 0]
            sensitivity = by_state @ sensitivity + by_action @ moved
        return total


def row_jacobians(values: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The derivatives (… k n) of values (… k) by inputs (… n), where each row of values depends on the same row of inputs only."""
    rows = [torch.autograd.grad(part.sum(), inputs, retain_graph=True) for part in values.unbind(-1)]
    return tuple(torch.stack(parts, -2) for parts in zip(*rows, strict=True))
