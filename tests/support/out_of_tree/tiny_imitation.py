"""A policy and a task small enough to train in milliseconds, found by the out-of-tree route `tiny_imitation:…`."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftori.data.demos import Demos
from difftori.il.config import TrainConfig, parse_config
from difftori.il.tasks import Evaluation, ImitationTask
from difftori.interfaces import Policy, PolicyConfig
from difftori.types import TaskSpec, flat_rows, state_obs

POLICY = "tiny_imitation:Tiny"
TASK = "tiny_imitation:make"


@dataclass(frozen=True)
class Inner:
    """A component as settings hold them: a frozen dataclass."""

    gain: float = 1.0
    rounds: int | None = None


@dataclass(frozen=True)
class Outer:
    """An alternative to `Inner`."""

    depth: int = 1


class TinyConfig(PolicyConfig):
    """Settings of `Tiny`."""

    hidden: tuple[int, ...] = (8,)
    """Widths of the hidden layers."""
    dropout: float = 0.1
    """Draws from torch's global generator."""
    noise: float = 0.1
    """Draws from the generator that is passed."""
    flag: bool = False
    """Nothing."""
    part: Inner | Outer = Inner()
    """Nothing."""
    trap: str = "none"
    """`term`, `kill`, `int`: a signal; `nan`: a NaN gradient; at the updates in `trap_at`."""
    trap_at: tuple[int, ...] = ()
    """Updates, counted from 1 over the whole run."""
    trap_file: str = ""
    """The trap is not sprung if this file exists; it is made when it is sprung."""


class Tiny(Policy):
    """A multilayer perceptron with dropout and noise, with traps to test a trainer with."""

    name = "tiny"
    Config = TinyConfig

    def __init__(self, config: TinyConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.trap = config
        widths = [spec.obs_dim, *config.hidden]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), nn.Tanh(), nn.Dropout(config.dropout)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], spec.horizon * spec.action_dim)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def predict(self, rows):
        return self.head(self.body(rows)).unflatten(1, (self.spec.horizon, self.spec.action_dim))

    def loss(self, batch, *, generator):
        self.calls += 1
        rows = flat_rows(batch.obs)
        noise = torch.randn(rows.shape, generator=generator) * self.trap.noise
        loss = (self.predict(rows + noise) - batch.actions).square().mean()
        if int(self.calls) in self.trap.trap_at:
            loss = self.spring(loss)
        return loss, {"mse": loss.item()}

    def act(self, obs, *, generator):
        with torch.no_grad():
            return self.predict(flat_rows(obs)).clamp(-1, 1)

    def spring(self, loss):
        if self.trap.trap == "nan":
            return (
                loss + (self.head.bias - self.head.bias.detach()).sum().clamp(min=0).sqrt() * 1.0
            )  # gradient Inf at 0
        marker = Path(self.trap.trap_file)
        if not marker.exists():
            marker.touch()
            numbers = {"term": signal.SIGTERM, "kill": signal.SIGKILL, "int": signal.SIGINT}
            os.kill(os.getpid(), numbers[self.trap.trap])
        return loss


class Alternating(Policy):
    """Trains its first network in even epochs, its second in odd ones."""

    name = "alternating"
    Config = PolicyConfig

    def __init__(self, config: PolicyConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.even = nn.Linear(spec.obs_dim, spec.horizon * spec.action_dim)
        self.odd = nn.Linear(spec.obs_dim, spec.horizon * spec.action_dim)

    def predict(self, obs):
        rows = flat_rows(obs)
        return (self.even(rows) + self.odd(rows)).unflatten(1, (self.spec.horizon, self.spec.action_dim))

    def loss(self, batch, *, generator):
        return (self.predict(batch.obs) - batch.actions).square().mean(), {}

    def act(self, obs, *, generator):
        return self.predict(obs).detach()

    def trainable(self, epoch):
        return (self.odd if epoch % 2 else self.even).parameters()


@dataclass(frozen=True)
class LinearTask(ImitationTask):
    """The expert is a linear map."""

    gain: torch.Tensor

    def evaluate(self, act, *, episodes, generator):
        obs = torch.randn(episodes, 3, generator=generator)
        error = (act(state_obs(obs)) - expert(obs, self.gain)).square().mean(dim=(1, 2))
        return Evaluation({"error": error.mean().item()}, {"error": error.tolist()})


def expert(obs, gain):
    return (obs @ gain).tanh().unflatten(1, (2, 1))


def make(*, seed, num_train=10):
    generator = torch.Generator().manual_seed(seed)
    gain = torch.randn(3, 2, generator=generator)
    sets = [torch.randn(n, 3, generator=generator) for n in (num_train, 5)]
    train, validation = (Demos(obs, expert(obs, gain)) for obs in sets)
    return LinearTask(TaskSpec.rows(3, 1, 2, (-1.0,), (1.0,)), train, validation, gain)


def tiny_config(
    *, policy: str = POLICY, env: str = TASK, seed: int = 0, save_every: int = 1, **settings: Any
) -> TrainConfig:
    """4 epochs of 3 updates, unless the settings say otherwise."""
    values = {"policy": policy, "env": env, "seed": seed, "num_train": 10, "save_every": save_every, "eval_episodes": 7}
    return parse_config({**values, "settings": {"epochs": 4, "batch_size": 4, **settings}})
