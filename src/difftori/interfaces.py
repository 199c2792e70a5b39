"""What the storeys above ask of a policy (imitation). Agents (reinforcement learning) join here with their trainer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from difftori.types import Chunk, Metrics, Observations, Plans, Scalar, TaskSpec


class PolicyConfig(BaseModel):
    """Base of every policy's settings: immutable, and an unknown name is an error rather than a silent default.

    The learning settings that trainers read stand here, so that each policy can carry its source's defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    optimizer: Literal["adam", "adamw", "rmsprop"] = "adam"
    """`adam`, `adamw` or `rmsprop`."""
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` falls to zero over the epochs."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled for adamw."""
    rmsprop_alpha: float = Field(0.99, ge=0, lt=1)
    """Memory of rmsprop's squared gradients."""
    epochs: int = Field(250, ge=1)
    """Passes over the training set."""
    batch_size: int = Field(32, ge=1)
    """Demonstrations per update."""
    clip_norm: float = Field(10.0, ge=0, allow_inf_nan=False)
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
