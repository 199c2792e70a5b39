"""Model parameters learned for prediction, and for return by the policy gradient through the planner, in closed loop.

The policy is model predictive control with a model f_θ that lacks the true system's friction. The parameters θ move

* `identified`: to the least one-step prediction error on all data (Gauss–Newton);
* `return`: along the policy gradient ∇_θ J = Σ_t ∂Q(s_t, a*(s_t; θ))/∂a · ∂a*/∂θ, the term of Eq. 6, where ∂a*/∂θ follows from the
  planner's optimality conditions, and ∂Q/∂a is the *compatible* critic of Silver et al. (2014, Theorem 3): the slope of the return
  to go by the executed exploration, with one weight for each parameter, over a learned value V(s, t);
* `both`: along the sum of both gradients, each in units of its initial loss, as Eq. 6 adds the term to Eq. 3;
* `flipped`: along the policy gradient of `return` with the wrong sign, a control;
* `network`: as `return`, with a critic network Q̃(s, a) that is learned by temporal differences, as the paper's;
* `exact`: along the derivative of the true closed loop's return, which needs the true dynamics: what a perfect critic would give.

All forms begin at the identified parameters. All groups (a form with a seed) are computed side by side, as rows of one batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from difftori.experiments.paper.mismatch_critics import CompatibleCritics, NetworkCritics
from difftori.experiments.paper.mismatch_loop import Closed, Rollout, row_jacobians
from difftori.experiments.paper.mismatch_systems import STEP, System

Form = Literal["return", "both", "flipped", "network", "identified", "exact"]
FORMS: tuple[Form, ...] = get_args(Form)
_COMPATIBLE, _BY_CRITIC = 3, 4
"""Number of forms with a compatible critic, which are the first ones, and with any critic."""
_SMALL = 0.2
"""Relative change of the cost per logarithm of a parameter, below which steps are proportional to the gradient (Adam's ε)."""
_FARTHEST = 1.5
"""Largest change of a parameter's logarithm from its identified value."""


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
        (slopes,) = row_jacobians(errors, point)
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


@dataclass(frozen=True)
class Budget:
    """Extent of one level: seeds, training epochs, episodes per epoch and seed, held-out starts, critic updates per epoch."""

    seeds: int
    epochs: int
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
        rollouts.append(loop.run(logs.repeat_interleave(budget.episodes, 0), starts, noise=generator, gradient=True))
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
        self.optimizer = torch.optim.Adam([self.logs], lr=budget.lr, eps=_SMALL)
        self.initial_error = prediction_error(loop.system, self.data, self.first)
        self.compatible = CompatibleCritics(loop.system, _COMPATIBLE * budget.seeds, seed=0)
        self.network = NetworkCritics(loop.system, budget.seeds, budget.discount, seed=0)
        self.initial_cost = rollouts[-1].costs.reshape(budget.seeds, -1).mean(1).repeat(count)
        for rollout in rollouts:
            self.compatible.add(_rows(rollout, slice(None), times=_COMPATIBLE))
            self.network.add(rollout)
        self.compatible.learn(5 * budget.updates)
        self.network.learn(5 * budget.updates)
        self.history: dict[str, list[Tensor]] = {}

    def epoch(self) -> None:
        """Run episodes with every group's parameters, train the critics, and move the parameters by one step."""
        budget, system, groups = self.budget, self.loop.system, len(self.logs)
        starts = system.starts(budget.seeds * budget.episodes, self.generator).repeat(len(FORMS), 1)
        rows = self.logs.repeat_interleave(budget.episodes, 0)
        rollout = self.loop.run(rows, starts, noise=self.generator, gradient=True)
        self.data = self.data.joined(Transitions.of(rollout, groups))
        by_critic = self._policy_gradient(rollout) / self.initial_cost[:, None]
        exact = _limited(self.loop.return_gradient(rollout).reshape(groups, budget.episodes, -1)).mean(1)
        exact = exact / self.initial_cost[:, None]
        error, by_prediction = self._prediction()
        self._log(rollout, by_critic, exact, by_prediction, error)
        steps = {
            "identified": torch.zeros_like(exact),
            "return": by_critic,
            "both": by_critic + by_prediction / self.initial_error[:, None],
            "flipped": -by_critic,
            "network": by_critic,
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

    def _group(self, form: Form) -> slice:
        index = FORMS.index(form)
        return slice(index * self.budget.seeds, (index + 1) * self.budget.seeds)

    def _policy_gradient(self, rollout: Rollout) -> Tensor:
        """Train the critics on a loop, and return the policy gradient (G P) of the cost; 0 for groups without a critic."""
        budget, gradient = self.budget, torch.zeros_like(self.logs)
        mine = slice(_COMPATIBLE * budget.seeds)
        self.compatible.add(_rows(rollout, slice(_COMPATIBLE * budget.seeds * budget.episodes)))
        self.compatible.learn(budget.updates)
        gradient[mine] = self.compatible.gradient(budget.episodes)
        own = self._group("network")
        loops = _rows(rollout, slice(own.start * budget.episodes, own.stop * budget.episodes))
        self.network.add(loops)
        self.network.learn(budget.updates)
        gradient[own] = self.network.gradient(loops, budget.episodes)
        return gradient

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
            "policy gradient": by_critic.norm(dim=1),
            "exact gradient": exact.norm(dim=1),
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
