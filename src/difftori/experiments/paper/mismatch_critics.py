"""Critics of `difftori study mismatch`: what the return gains from another action."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from difftori.experiments.paper.mismatch_loop import Rollout
from difftori.experiments.paper.mismatch_systems import System

_KEPT = 3
"""Number of loops from which critics learn."""
_BATCH = 128


class _Networks:
    """One network for each of G groups, evaluated side by side: inputs (G M n) → (G M)."""

    def __init__(self, groups: int, inputs: int, lr: float, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks = [
                nn.Sequential(nn.Linear(inputs, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 1))
                for _ in range(groups)
            ]
        self.network = copy.deepcopy(networks[0]).to("meta")
        self.parameters, _ = stack_module_state(networks)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=lr)

    def __call__(self, inputs: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        def one(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
            return functional_call(self.network, weights, (rows,)).squeeze(-1)

        return vmap(one)(self.parameters if parameters is None else parameters, inputs.float())

    def rows(self, total: int) -> Tensor:
        """Sample the steps of one update."""
        return torch.randint(total, (_BATCH,), generator=self.generator)

    def fit(self, inputs: Tensor, target: Tensor) -> None:
        """One step towards the target (G M)."""
        loss = (self(inputs) - target.float()).square().mean(1).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class CompatibleCritics:
    """The policy gradient of G groups from the returns to go of the last loops (Silver et al., 2014, Theorem 3).

    With the exploration ε = a − a*(s; θ), the return to go is V(s, t) + (∂a*/∂θ ε)ᵀ w + noise; least squares give w, and the gradient
    Σ_t ∂a*/∂θ (∂a*/∂θ)ᵀ w. Unlike a network's slope ∂Q̃/∂a, w cannot mistake the effect of the state for that of the action,
    because ε does not depend on the state.
    """

    def __init__(self, system: System, groups: int, seed: int):
        self.system, self.groups = system, groups
        self.values = _Networks(groups, len(system.start) + 2, lr=3e-3, seed=seed)
        self.loops: list[tuple[Tensor, ...]] = []
        self.scale = 1.0

    def add(self, rollout: Rollout) -> None:
        """Add a loop with derivatives and exploration."""
        times = torch.linspace(0, 1, rollout.rewards.shape[1], dtype=rollout.rewards.dtype).expand_as(rollout.rewards)
        inputs = torch.cat((self.system.features(rollout.states[:, :-1]), times[..., None]), -1)
        ahead = rollout.rewards.flip(1).cumsum(1).flip(1)
        parts = (
            inputs,
            ahead[..., None],
            rollout.by_parameters * (rollout.executed - rollout.planned),
            rollout.by_parameters,
        )
        if not self.loops:
            self.scale = float(ahead.abs().mean())
        self.loops = _kept(self.loops, parts, self.groups)

    def learn(self, updates: int) -> None:
        """Regress V on the returns to go."""
        inputs, ahead = (torch.cat(part, 1) for part in list(zip(*self.loops, strict=True))[:2])
        for _ in range(updates):
            rows = self.values.rows(inputs.shape[1])
            self.values.fit(inputs[:, rows], ahead[:, rows, 0] / self.scale)

    def gradient(self, episodes: int) -> Tensor:
        """The gradient (G P) of the mean cost of `episodes` episodes per loop and group."""
        inputs, ahead, effects, slopes = (torch.cat(part, 1) for part in zip(*self.loops, strict=True))
        with torch.no_grad():
            rest = ahead - self.scale * self.values(inputs)[..., None].to(ahead)
        moments = effects.mT @ effects
        ridge = 1e-6 * moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-12
        eye = torch.eye(moments.shape[-1], dtype=moments.dtype)
        weights = torch.linalg.solve(moments + ridge * eye, effects.mT @ rest)
        return -(slopes.mT @ slopes @ weights).squeeze(-1) / (len(self.loops) * episodes)


class NetworkCritics:
    """A critic network Q̃(s, a) for each of G groups, learned by temporal differences from the last loops."""

    def __init__(self, system: System, groups: int, discount: float, seed: int):
        self.system, self.groups, self.discount = system, groups, discount
        self.values = _Networks(groups, len(system.start) + 2, lr=1e-3, seed=seed)
        self.targets = {name: value.detach().clone() for name, value in self.values.parameters.items()}
        self.loops: list[tuple[Tensor, ...]] = []

    def add(self, rollout: Rollout) -> None:
        """Add a loop."""
        parts = (
            rollout.states[:, :-2],
            rollout.executed[:, :-1],
            rollout.rewards[:, :-1, None],
            rollout.states[:, 1:-1],
            rollout.planned[:, 1:],
        )
        self.loops = _kept(self.loops, parts, self.groups)

    def learn(self, updates: int) -> None:
        """Make updates towards r + γ Q̃⁻(s', a*(s'))."""
        states, actions, rewards, following, planned = (torch.cat(part, 1) for part in zip(*self.loops, strict=True))
        present, ahead = self._inputs(states, actions), self._inputs(following, planned)
        for _ in range(updates):
            rows = self.values.rows(states.shape[1])
            with torch.no_grad():
                target = rewards[:, rows, 0] + self.discount * self.values(ahead[:, rows], self.targets)
            self.values.fit(present[:, rows], target)
            with torch.no_grad():
                for name, weights in self.targets.items():
                    weights.lerp_(self.values.parameters[name], 0.02)

    def action_gradient(self, states: Tensor, actions: Tensor) -> Tensor:
        """∂Q̃/∂a (G M 1)."""
        point = actions.detach().requires_grad_()
        return torch.autograd.grad(self.values(self._inputs(states, point)).sum(), point)[0]

    def gradient(self, rollout: Rollout, episodes: int) -> Tensor:
        """The gradient (G P) of −Σ_t Q̃(s_t, a*(s_t; θ)) at a loop, the mean over episodes."""
        parts = rollout.states[:, :-1], rollout.planned, rollout.by_parameters
        states, actions, slopes = (part.reshape(self.groups, -1, part.shape[-1]) for part in parts)
        return -(self.action_gradient(states, actions) * slopes).sum(1) / episodes

    def _inputs(self, states: Tensor, actions: Tensor) -> Tensor:
        return torch.cat((self.system.features(states), actions / self.system.bound), -1)


def _kept(loops: list[tuple[Tensor, ...]], parts: Sequence[Tensor], groups: int) -> list[tuple[Tensor, ...]]:
    """The last loops with a new one, whose rows (groups·N T n) become the steps of each group (groups N·T n)."""
    return [*loops, tuple(part.reshape(groups, -1, part.shape[-1]) for part in parts)][-_KEPT:]
