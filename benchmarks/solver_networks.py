"""The world model and the chunk score of the benchmark's problems, at the paper's sizes, fitted to small random teachers.

They are fitted, because the landscape of an untrained network has no structure for a planner to find.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftori.models.nets import mlp
from difftori.models.world_model import WorldModel
from difftori.types import Actions, Latents, Rows

LATENT = 50
ACTIONS = 6
WIDTH = 512
DISCOUNT = 0.99
CHUNK = 16
CHUNK_CONTEXT = 256 + 64

_VERSION = 2  # of the recipe: increase it if the teacher or the fit changes, to invalidate old caches


class Teacher:
    """A small smooth system with a reachable reward: contraction towards a tanh network, Gaussian reward.

    The dynamics and rewards depend on 8 features of z only, so that networks of the paper's size can learn them from few
    samples and the twin critics have similar slopes. Critics with different slopes put every optimum on the ridge where they
    are equal.
    """

    FEATURES = 8
    STEPS = 30

    def __init__(self, generator: torch.Generator):
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.generator = generator
        self.features = normal(self.FEATURES, LATENT) * 0.9 / math.sqrt(LATENT)
        self.drift = normal(LATENT, self.FEATURES) / math.sqrt(self.FEATURES)
        self.push = normal(LATENT, ACTIONS) / math.sqrt(ACTIONS)
        # Orthogonal, so that all actions have similar influence and the Hessians of the fitted objective are moderately conditioned.
        self.felt = 1.6 * torch.linalg.qr(normal(self.FEATURES, ACTIONS)).Q
        self.habit = -torch.linalg.pinv(self.felt) @ self.features

    def next(self, z: Latents, a: Actions) -> Latents:
        """The next state."""
        return 0.7 * z + 0.6 * torch.tanh(z @ self.features.T @ self.drift.T + a @ self.push.T)

    def reward(self, z: Latents, a: Actions) -> Rows:
        """Rewards in (0, 2], as in a DeepMind Control task with every action repeated twice."""
        miss = (z @ self.features.T + a @ self.felt.T).square().mean(-1)
        return 2.0 * torch.exp(-0.5 * miss) - 0.04 * a.square().mean(-1)

    def value(self, z: Latents, a: Actions) -> Rows:
        """The discounted return of STEPS steps that begin with a and continue with a simple linear policy."""
        total = torch.zeros(z.shape[0])
        for t in range(self.STEPS):
            total = total + DISCOUNT**t * self.reward(z, a)
            z = self.next(z, a)
            a = torch.tanh(z @ self.habit.T)
        return total

    def states(self, count: int) -> Latents:
        """States visited under random actions."""
        z = torch.randn(count, LATENT, generator=self.generator)
        for _ in range(6):
            z = self.next(z, 2 * torch.rand(count, ACTIONS, generator=self.generator) - 1)
        return z


def world_model() -> WorldModel:
    """An unfitted world model at the paper's sizes. Its states are already latents."""
    return WorldModel(nn.Identity(), ACTIONS, latent_dim=LATENT, width=WIDTH)


def fit_world_model(seed: int, *, steps: int = 500, batch: int = 256) -> WorldModel:
    """A world model fitted to a random teacher: dynamics, reward and critics by regression, then the prior by ascent on Q.

    This takes about 40 s on one thread with the defaults. The same seed on the same machine gives the same networks.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = Teacher(generator)
    with torch.random.fork_rng(devices=[]):
        model = world_model()
        torch.manual_seed(seed)
        for module in _in_order(model):  # PyTorch's initialisation, as in the committed results
            module.reset_parameters()
    z_all = teacher.states(64 * batch)
    a_all = 1.2 * (2 * torch.rand(64 * batch, ACTIONS, generator=generator) - 1)
    next_all, reward_all, value_all = (
        teacher.next(z_all, a_all),
        teacher.reward(z_all, a_all),
        teacher.value(z_all, a_all),
    )
    for critic in model.critics.members:
        *_, last = critic.children()
        assert isinstance(last, nn.Linear)
        last.bias.data.fill_(float(value_all.mean()))
    fitted = [*model.dynamics.parameters(), *model.reward_head.parameters(), *model.critics.parameters()]
    adam = torch.optim.Adam(fitted, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        rows = torch.randint(len(z_all), (batch,), generator=generator)
        z, a = z_all[rows], a_all[rows]
        loss = (model.next(z, a) - next_all[rows]).square().mean()
        loss = loss + 10 * (model.reward(z, a) - reward_all[rows]).square().mean()
        for q in model.q(z, a):
            loss = loss + (q - value_all[rows]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    adam = torch.optim.Adam(model.policy.parameters(), lr=1e-3)
    for _ in range(steps // 5):
        z = z_all[torch.randint(len(z_all), (batch,), generator=generator)]
        loss = -model.value(z).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval().requires_grad_(False)


def _in_order(model: WorldModel) -> Iterator[nn.Linear | nn.LayerNorm]:
    for network in (model.dynamics, model.reward_head, *model.critics.members, model.policy):
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                yield module


class ChunkScore(nn.Module):
    """f(z, a) of the imitation release: 256 state + 64 posterior + 16 chunk → 256 → 256 → 1, ELU. Higher is better."""

    def __init__(self):
        super().__init__()
        self.net = mlp((CHUNK_CONTEXT + CHUNK, 256, 256, 1), nn.ELU)

    def forward(self, x: Float[Tensor, "B n"], z: Float[Tensor, "B Z"]) -> Rows:
        """The score of each row's chunk."""
        return self.net(torch.cat([z, x], -1)).squeeze(-1)


def fit_chunk_score(seed: int, *, steps: int = 400, batch: int = 256) -> tuple[ChunkScore, Tensor]:
    """The score f, fitted to minus the squared distance from a random expert's chunk, and the expert's matrix (16, 320).

    The expert depends on 6 directions of the context only, so that few samples suffice to learn it.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randn(6, CHUNK_CONTEXT, generator=generator) / math.sqrt(CHUNK_CONTEXT)
    expert = torch.randn(CHUNK, 6, generator=generator) @ seen / math.sqrt(6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        score = ChunkScore()
    adam = torch.optim.Adam(score.parameters(), lr=1e-3)
    for _ in range(steps):
        z = torch.randn(batch, CHUNK_CONTEXT, generator=generator)
        chunk = torch.tanh(z @ expert.T)
        x = chunk + 0.5 * torch.randn(batch, CHUNK, generator=generator)
        loss = (score(x, z) + (x - chunk).square().sum(-1)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return score.eval().requires_grad_(False), expert


def cached(folder: Path, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` returns, read from `folder` if the same recipe wrote them before."""
    path = folder / f"{name}-v{_VERSION}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    tensors = make()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(tensors, partial)
    partial.replace(path)
    return tensors
