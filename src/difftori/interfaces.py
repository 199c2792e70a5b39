"""What the storeys above ask of a policy (imitation). Agents (reinforcement learning) join here with their trainer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from difftori.types import Chunk, Metrics, Observations, Plans, Scalar, TaskSpec


class PolicyConfig(BaseModel):
    """Base of every policy's settings: immutable, and an unknown name is an error rather than a silent default.

    The learning settings that trainers read stand here, so that each policy can carry its source's defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: str = "adam"
    """`adam`, `adamw` or `rmsprop`."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 0.0
    """Decoupled for adamw."""
    epochs: int = 250
    """Passes over the training set."""
    batch_size: int = 32
    """Demonstrations per update."""
    clip_norm: float = 10.0
    """Gradients longer than this are shortened to it; 0 switches clipping off."""


class Policy(nn.Module, ABC):
    """Maps observations to the next H actions, and knows its own training loss.

    A concrete policy lives in one file of `difftori.policies`, sets `name` and `Config`, and is built as
    `SomePolicy(config, spec)`. It is found by walking the package: there is no registry to edit.
    """

    name: ClassVar[str]
    Config: ClassVar[type[PolicyConfig]]

    def __init__(self, config: PolicyConfig, spec: TaskSpec):
        super().__init__()
        self.config = config
        self.spec = spec

    @abstractmethod
    def loss(self, batch: Chunk, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """The training loss of a batch, ready for `backward`, and named numbers to log."""

    @abstractmethod
    def act(self, obs: Observations, *, generator: torch.Generator) -> Plans:
        """The H actions to execute from each observation, (B H A), inside the action box, without a graph."""

    def trainable(self, epoch: int) -> Iterable[Tensor]:
        """The parameters that are updated in this epoch: all of them unless a policy alternates."""
        return self.parameters()
