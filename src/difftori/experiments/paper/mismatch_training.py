"""Model parameters learned for prediction, and for return by the policy gradient through the planner, in closed loop.

The policy is model predictive control with a model f_θ that lacks the true system's friction. The parameters θ move

* `identified`: to the least one-step prediction error on all data (Gauss–Newton);
* `return`: along ∇_θ Q̃(s, a*(s; θ)) = ∂Q̃/∂a · ∂a*/∂θ, the policy-gradient term of Eq. 6, with a critic Q̃ that is learned from
  the closed loop, and ∂a*/∂θ from the planner's optimality conditions;
* `both`: along the sum of both gradients, each in units of its initial loss, as Eq. 6 adds the term to Eq. 3;
* `flipped`: along the policy gradient with the wrong sign, a control;
* `exact`: along the derivative of the true closed loop's return, which needs the true dynamics: what a perfect critic would give.

All forms begin at the identified parameters. All groups (a form with a seed) are computed side by side, as rows of one batch.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from difftori.errors import NonFiniteError
from difftori.experiments.paper.mismatch_systems import STEP, System
from difftori.planning import plan
from difftori.solver import Status

Form = Literal["return", "both", "flipped", "identified", "exact"]
FORMS: tuple[Form, ...] = get_args(Form)
_BY_CRITIC = 3
"""The first forms use a critic."""
_FIRST_GUESS, _COLD_STEPS, _WARM_STEPS, _TOLERANCE = 0.01, 60, 8, 1e-3
_NOISE, _PROCESS_NOISE = 0.1, 0.02
"""Exploration in units of the largest force, and disturbance of the velocities (m/s, rad/s), standard deviations."""
_FARTHEST = 1.5
"""Largest change of a parameter's logarithm from its identified value."""


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
                executed = executed + _NOISE * system.bound * _normal(executed, noise)
                executed = executed.clamp(-system.bound, system.bound)
            track.append((state, planned, executed, system.reward(state, executed), *slopes, valid))
            state = true(state, executed)
            if noise is not None:
                half = state.shape[1] // 2
                state = torch.cat(
                    (state[:, :half], state[:, half:] + _PROCESS_NOISE * _normal(state[:, half:], noise)), 1
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
            by_state, by_action = _jacobians(true(state, action), state, action)
            cost = -self.system.reward(state, action)
            cost_by_state, cost_by_action = _jacobians(cost[:, None], state, action)
            moved = rollout.by_parameters[:, step, None] + rollout.by_state[:, step, None] @ sensitivity
            total = total + (cost_by_state @ sensitivity + cost_by_action @ moved)[:, 0]
            sensitivity = by_state @ sensitivity + by_action @ moved
        return total


def _jacobians(values: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The derivatives (… k n) of values (… k) by inputs (… n), where each row of values depends on the same row of inputs only."""
    rows = [torch.autograd.grad(part.sum(), inputs, retain_graph=True) for part in values.unbind(-1)]
    return tuple(torch.stack(parts, -2) for parts in zip(*rows, strict=True))


@dataclass(frozen=True)
class Transitions:
    """Recorded steps of G groups: states (G M S), actions (G M 1), next states (G M S)."""

    states: Tensor
    actions: Tensor
    following: Tensor

    @staticmethod
    def of(rollout: Rollout, groups: int) -> "Transitions":
        """The steps of a loop whose rows are `groups` groups of equal size."""
        parts = rollout.states[:, :-1], rollout.executed, rollout.states[:, 1:]
        return Transitions(*(part.reshape(groups, -1, part.shape[-1]) for part in parts))

    def joined(self, other: "Transitions") -> "Transitions":
        """These and further steps of the same groups."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Transitions(*(torch.cat(pair, 1) for pair in pairs))

    def repeated(self, times: int) -> "Transitions":
        """The groups `times` times, one copy after the other."""
        return Transitions(*(part.repeat(times, 1, 1) for part in vars(self).values()))


def prediction_error(system: System, data: Transitions, logs: Tensor) -> Tensor:
    """The mean squared error (G) of the predicted accelerations, for parameters (G P) of a model without friction."""
    return _residuals(system, data, _by_step(data, logs)).square().mean((1, 2))


def identify(system: System, data: Transitions, logs: Tensor, iterations: int = 15) -> Tensor:
    """The parameters (G P) with the least one-step prediction error, by Gauss–Newton from `logs`."""
    for _ in range(iterations):
        point = _by_step(data, logs).detach().requires_grad_()
        errors = _residuals(system, data, point)
        (slopes,) = _jacobians(errors, point)
        slopes, errors = slopes.flatten(1, 2), errors.detach().flatten(1)  # (G M·S/2 P), (G M·S/2)
        damped = slopes.mT @ slopes + 1e-9 * torch.eye(logs.shape[1], dtype=logs.dtype)
        move = torch.linalg.solve(damped, slopes.mT @ errors[..., None]).squeeze(-1)
        logs = logs - move.clamp(-0.3, 0.3)
    return logs


def _by_step(data: Transitions, logs: Tensor) -> Tensor:
    """The parameters (G P) of every step (G M P)."""
    return logs[:, None].expand(*data.states.shape[:-1], -1)


def _residuals(system: System, data: Transitions, logs: Tensor) -> Tensor:
    """The errors (G M S/2) of the predicted accelerations, for parameters (G M P)."""
    half = data.states.shape[-1] // 2
    measured = (data.following[..., half:] - data.states[..., half:]) / STEP
    return system.acceleration(data.states, data.actions[..., 0], logs.exp(), 0.0) - measured


class Critics:
    """A critic Q̃(s, a) for each of G groups, learned by temporal differences from the closed loop: one network for each."""

    def __init__(self, system: System, groups: int, discount: float, seed: int):
        self.system, self.discount = system, discount
        self.generator = torch.Generator().manual_seed(seed)
        inputs = len(system.start) + 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks = [
                nn.Sequential(nn.Linear(inputs, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 1))
                for _ in range(groups)
            ]
        self.network = copy.deepcopy(networks[0]).to("meta")
        self.parameters, _ = stack_module_state(networks)
        self.targets = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=1e-3)
        self.steps: list[tuple[Tensor, ...]] = []

    def value(self, states: Tensor, actions: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Q̃ (G M) of states (G M S) and actions (G M 1)."""
        inputs = torch.cat((self.system.features(states), actions / self.system.bound), -1).float()

        def one(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
            return functional_call(self.network, weights, (rows,)).squeeze(-1)

        return vmap(one)(self.parameters if parameters is None else parameters, inputs)

    def add(self, rollout: Rollout, groups: int, keep: int) -> None:
        """Add the steps of a loop, and keep those of the last `keep` loops."""
        parts = (
            rollout.states[:, :-2],
            rollout.executed[:, :-1],
            rollout.rewards[:, :-1, None],
            rollout.states[:, 1:-1],
            rollout.planned[:, 1:],
        )
        self.steps = [*self.steps, tuple(part.reshape(groups, -1, part.shape[-1]) for part in parts)][-keep:]

    def learn(self, updates: int, batch: int = 128) -> None:
        """Make updates towards r + γ Q̃⁻(s', a*(s'))."""
        parts = [torch.cat(part, 1) for part in zip(*self.steps, strict=True)]
        for _ in range(updates):
            rows = torch.randint(parts[0].shape[1], (batch,), generator=self.generator)
            states, actions, rewards, following, planned = (part[:, rows] for part in parts)
            with torch.no_grad():
                target = rewards.squeeze(-1).float() + self.discount * self.value(following, planned, self.targets)
            loss = (self.value(states, actions) - target).square().mean(1).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                for name, target_weights in self.targets.items():
                    target_weights.lerp_(self.parameters[name], 0.02)

    def action_gradient(self, states: Tensor, actions: Tensor) -> Tensor:
        """∂Q̃/∂a (G M 1)."""
        point = actions.detach().requires_grad_()
        return torch.autograd.grad(self.value(states, point).sum(), point)[0]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


@dataclass(frozen=True)
class Budget:
    """Extent of one level: seeds, training epochs, episodes per epoch and seed, held-out starts, critic updates per epoch."""

    seeds: int = 8
    epochs: int = 12
    episodes: int = 4
    held_out: int = 16
    updates: int = 100
    lr: float = 0.04
    discount: float = 0.95


@dataclass(frozen=True)
class Level:
    """The result of one level.

    `costs`: held-out costs (seeds, starts) by form, and of the references `true parameters` and `true system` (1, starts).
    `parameters`: the final parameters (seeds, P) by form. `history`: measures per epoch and seed, (epochs, seeds), by form.
    """

    costs: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]
    history: dict[str, dict[str, np.ndarray]]


def run_level(loop: Closed, budget: Budget, watch: Callable[[int], None] = lambda epoch: None) -> Level:
    """Learn the parameters in every form, and evaluate them on held-out starts. The same call gives the same numbers."""
    generator = torch.Generator().manual_seed(0)
    logs, data, rollouts = _identified(loop, budget, generator)
    training = _Training(loop, budget, logs, data, rollouts, generator)
    for epoch in range(budget.epochs):
        training.epoch()
        watch(epoch + 1)
    return training.result()


def _identified(loop: Closed, budget: Budget, generator: torch.Generator) -> tuple[Tensor, Transitions, list[Rollout]]:
    """Identify the parameters (seeds P) of every seed from three closed loops, the first with parameters that are off by some 30 %."""
    system = loop.system
    logs = system.logs + 0.3 * torch.randn(budget.seeds, len(system.logs), generator=generator, dtype=torch.float64)
    data, rollouts = None, []
    for _ in range(3):
        starts = system.starts(budget.seeds * budget.episodes, generator)
        rollouts.append(loop.run(logs.repeat_interleave(budget.episodes, 0), starts, noise=generator))
        fresh = Transitions.of(rollouts[-1], budget.seeds)
        data = fresh if data is None else data.joined(fresh)
        logs = identify(system, data, logs)
    assert data is not None
    return logs, data, rollouts


class _Training:
    """All forms and seeds side by side: group form · seeds + seed."""

    def __init__(
        self,
        loop: Closed,
        budget: Budget,
        logs: Tensor,
        data: Transitions,
        rollouts: list[Rollout],
        generator: torch.Generator,
    ):
        self.loop, self.budget, self.generator = loop, budget, generator
        count = len(FORMS)
        self.first, self.data = logs.repeat(count, 1), data.repeated(count)
        self.logs = self.first.clone()
        self.optimizer = torch.optim.Adam([self.logs], lr=budget.lr)
        self.initial_error = prediction_error(loop.system, self.data, self.first)
        self.learning = _BY_CRITIC * budget.seeds  # groups with a critic, the first ones
        self.critics = Critics(loop.system, self.learning, budget.discount, seed=0)
        self.initial_cost = rollouts[-1].costs.reshape(budget.seeds, -1).mean(1).repeat(count)
        for rollout in rollouts:
            self.critics.add(_rows(rollout, slice(None), times=_BY_CRITIC), self.learning, keep=3)
        self.critics.learn(5 * budget.updates)
        self.history: dict[str, list[Tensor]] = {}

    def epoch(self) -> None:
        """Run episodes with every group's parameters, train the critics, and move the parameters by one step."""
        budget, system, groups = self.budget, self.loop.system, len(self.logs)
        starts = system.starts(budget.seeds * budget.episodes, self.generator).repeat(len(FORMS), 1)
        rows = self.logs.repeat_interleave(budget.episodes, 0)
        rollout = self.loop.run(rows, starts, noise=self.generator, gradient=True)
        self.data = self.data.joined(Transitions.of(rollout, groups))
        self.critics.add(_rows(rollout, slice(self.learning * budget.episodes)), self.learning, keep=3)
        self.critics.learn(budget.updates)
        by_critic = self._policy_gradient(rollout)
        exact = _limited(self.loop.return_gradient(rollout).reshape(groups, budget.episodes, -1)).mean(1)
        error, by_prediction = self._prediction()
        self._log(rollout, by_critic, exact, by_prediction, error)
        steps = {
            "identified": torch.zeros_like(exact),
            "return": by_critic,
            "both": by_critic / self.initial_cost[:, None] + by_prediction / self.initial_error[:, None],
            "flipped": -by_critic,
            "exact": exact,
        }
        self.logs.grad = torch.cat([steps[form][self._group(form)] for form in FORMS])
        self.optimizer.step()
        with torch.no_grad():
            self.logs.copy_(self.logs.maximum(self.first - _FARTHEST).minimum(self.first + _FARTHEST))
        own = self._group("identified")
        mine = Transitions(*(part[own] for part in vars(self.data).values()))
        self.logs[own] = identify(system, mine, self.logs[own], iterations=3)

    def result(self) -> Level:
        """Evaluate all groups and the two references on the same held-out starts, without noise."""
        budget, system = self.budget, self.loop.system
        starts = system.starts(budget.held_out, torch.Generator().manual_seed(1))
        every = torch.cat((system.logs[None], self.logs))
        costs = self.loop.run(every.repeat_interleave(len(starts), 0), starts.repeat(len(every), 1)).costs
        costs = costs.reshape(len(every), -1).numpy()
        knowing = Closed(system, self.loop.friction, self.loop.horizon, self.loop.steps, known=self.loop.friction)
        best = knowing.run(system.logs.expand(len(starts), -1), starts).costs.numpy()
        forms = {form: costs[1:][self._group(form)] for form in FORMS}
        return Level(
            {**forms, "true parameters": costs[:1], "true system": best[None]},
            {form: self.logs[self._group(form)].exp().numpy() for form in FORMS},
            {
                form: {
                    name: torch.stack(rows)[:, self._group(form)].numpy()
                    for name, rows in self.history.items()
                    if "cosine" not in name or FORMS.index(form) < _BY_CRITIC
                }
                for form in FORMS
            },
        )

    def _group(self, form: str) -> slice:
        index = FORMS.index(form)  # pyright: ignore[reportArgumentType]
        return slice(index * self.budget.seeds, (index + 1) * self.budget.seeds)

    def _policy_gradient(self, rollout: Rollout) -> Tensor:
        """The gradient (G P) of −Σ_t Q̃(s_t, a*(s_t; θ)), the mean over episodes; 0 for groups without a critic."""
        parts = rollout.states[:, :-1], rollout.planned, rollout.by_parameters
        states, actions, slopes = (part.reshape(len(self.logs), -1, part.shape[-1]) for part in parts)
        mine = slice(self.learning)
        gradient = torch.zeros_like(self.logs)
        gradient[mine] = -(self.critics.action_gradient(states[mine], actions[mine]) * slopes[mine]).sum(1)
        return gradient / self.budget.episodes

    def _prediction(self) -> tuple[Tensor, Tensor]:
        point = self.logs.detach().requires_grad_()
        error = prediction_error(self.loop.system, self.data, point)
        return error.detach(), torch.autograd.grad(error.sum(), point)[0]

    def _log(self, rollout: Rollout, by_critic: Tensor, exact: Tensor, by_prediction: Tensor, error: Tensor) -> None:
        groups = len(self.logs)
        measures = {
            "training cost": rollout.costs.reshape(groups, -1).mean(1),
            "prediction error": error,
            "cosine of critic's and exact gradient": torch.cosine_similarity(by_critic, exact),
            "cosine of policy and prediction gradient": torch.cosine_similarity(by_critic, by_prediction),
            "valid gradients": rollout.valid.double().reshape(groups, -1).mean(1),
        }
        for name, value in measures.items():
            self.history.setdefault(name, []).append(value)


def _limited(gradients: Tensor) -> Tensor:
    """Limit the norm of each episode's gradient (G N P) to the median over the group's episodes."""
    norms = gradients.norm(dim=-1, keepdim=True)
    return gradients * (norms.median(1, keepdim=True).values / norms.clamp(min=1e-12)).clamp(max=1)


def _rows(rollout: Rollout, rows: slice, times: int = 1) -> Rollout:
    """Some rows of a loop, `times` times."""
    return Rollout(*(part[rows].repeat(times, *[1] * (part.dim() - 1)) for part in vars(rollout).values()))
