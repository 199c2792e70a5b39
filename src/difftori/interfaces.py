"""What the storeys above ask of a policy (imitation) and of an agent (reinforcement learning)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from difftori.types import (
    Actions,
    EnvSpec,
    Metrics,
    Observations,
    Plans,
    RowFlags,
    Rows,
    Scalar,
    Segment,
    TaskSpec,
    Window,
    WindowObs,
)


class Settings(BaseModel):
    """Settings of a policy or an agent: immutable, and an unknown name is an error rather than a silent default.

    `PRESETS` names sets of other defaults, which hold for what is not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not cls.PRESETS:
            return values
        name = values.get("preset", cls.model_fields["preset"].default)
        if not isinstance(name, str) or name not in cls.PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(cls.PRESETS)}")
        return {**cls.PRESETS[name], **values}


class PolicyConfig(Settings):
    """Base of every policy's settings; those that trainers read, so that each policy can carry its source's defaults."""

    optimizer: Literal["adam", "adamw", "rmsprop"] = "adam"
    """`adam`, `adamw` or `rmsprop`."""
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` falls to zero over the epochs, or over `updates` where they are given."""
    warmup: int = Field(0, ge=0)
    """Updates over which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled for adamw."""
    rmsprop_alpha: float = Field(0.99, ge=0, lt=1)
    """Memory of rmsprop's squared gradients."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Memory of adam's gradients."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Memory of adam's squared gradients."""
    epochs: int = Field(250, ge=1)
    """Passes over the training set."""
    updates: int | None = Field(None, ge=1)
    """So many updates instead of so many `epochs`; the last epoch is cut short."""
    batch_size: int = Field(32, ge=1)
    """Demonstrations per update."""
    clip_norm: float = Field(10.0, ge=0, allow_inf_nan=False)
    """Gradients longer than this are shortened to it; 0 switches clipping off."""
    ema: float = Field(0.0, ge=0, lt=1)
    """The weights that act are an average over updates t with decay 1 − (1 + t)^−3/4, at most this; 0: the last ones
    (Chi et al., 2023, have .9999)."""


class Policy(nn.Module, ABC):
    """Maps the last O observations to actions, and knows its own training loss.

    A policy sees normalised observations and actions: `NormalizedPolicy` converts the units of a task for all policies. A
    concrete policy lives in one file of `difftori.policies`, sets `name` and `Config`, and is built as
    `SomePolicy(config, spec)`. It is found by walking the package: there is no registry to edit.
    """

    name: ClassVar[str]
    Config: ClassVar[type[PolicyConfig]]
    WINDOW: ClassVar[tuple[int, int, int] | None] = None
    """`n_obs_steps`, `horizon` and `n_action_steps` where none are given; None leaves them to the task."""
    STOCHASTIC: ClassVar[bool] = False
    """Whether `act` samples."""
    NORMALIZES: ClassVar[Literal["all", "observations", "nothing"]] = "all"
    """What is brought from the range of the training data to [−1, 1], actions without data from their box."""
    FROM_PRESENT: ClassVar[bool] = False
    """Whether a policy sees and returns actions from the present on, (B P A), instead of all H of a window (B H A)."""

    def __init__(self, config: PolicyConfig, spec: TaskSpec):
        super().__init__()
        self.config = config
        self.spec = spec
        self.stochastic = self.STOCHASTIC
        """Whether `act` samples, with the settings given."""

    @abstractmethod
    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """The training loss of a batch, ready for `backward`, and named numbers to log."""

    @abstractmethod
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """The actions (B H A) from the oldest observation on, or (B P A) with `FROM_PRESENT`, without a graph.

        Those in `spec.present` will be executed.
        """

    def trainable(self, epoch: int) -> Iterable[Tensor]:
        """The parameters that are updated in this epoch: all of them unless a policy alternates."""
        return self.parameters()


@runtime_checkable
class Dataset(Protocol):
    """A dataset of windows to learn from."""

    def __len__(self) -> int:
        """How many."""
        ...

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Window]:
        """One pass in random order; `generator` lives on the CPU."""
        ...

    def in_order(self, batch_size: int = ...) -> Iterator[Window]:
        """One pass in order."""
        ...


class AgentConfig(Settings):
    """Base of every agent's settings; those that the trainer reads stand here."""

    model_config = ConfigDict(allow_inf_nan=False)
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}}

    preset: str = "paper"
    """Which defaults hold for what is not given: `paper`, or another that the agent names."""
    horizon: int = Field(5, ge=1)
    """T, steps of a recorded slice, and H of the longest plan."""
    batch_size: int | None = Field(None, ge=1)
    """Slices per update; the agent's own number unless given."""
    seed_steps: int = Field(5000, ge=0)
    """Random agent steps before the first update; as many updates follow at once."""
    updates_per_step: float = Field(1.0, gt=0)
    """Updates per agent step afterwards; they are made at the end of an episode."""


Memory: TypeAlias = dict[str, Tensor]
"""What an agent keeps from one agent step to the next, rows first: the plan that warm-starts the next solve."""


class Agent(nn.Module, ABC):
    """Acts in a vector of environments and learns from recorded slices, with optimisers of its own.

    A concrete agent lives in one file of `difftori.agents`, sets `name` and `Config`, and is built as
    `SomeAgent(config, spec)`. Whatever it draws comes from the generators that it is given.
    """

    name: ClassVar[str]
    Config: ClassVar[type[AgentConfig]]
    batch_size: int
    compiles = False
    """Whether its computations of fixed shape are to go through torch.compile; the trainer's `--compile` sets it."""

    def __init__(self, config: AgentConfig, spec: EnvSpec):
        super().__init__()
        self.config = config
        self.spec = spec

    @abstractmethod
    def act(
        self,
        obs: Observations,
        memory: "Memory | None" = None,
        *,
        first: RowFlags,
        step: int,
        explore: bool,
        generator: torch.Generator,
    ) -> tuple[Actions, "Memory"]:
        """One action per environment, (B A) in [−1, 1], without a graph, and what to hand in with the next observation.

        `first` (B): rows whose episode begins with `obs`, so that `memory` does not hold for them. `step`: agent steps
        taken so far in training, for schedules. `explore`: with exploration noise.
        """

    @abstractmethod
    def update(self, segment: Segment, *, generator: torch.Generator) -> tuple[Rows, Metrics]:
        """Learn from a batch once: new priorities (B), and named numbers to log."""

    def end_episode(self, obs: Observations, *, generator: torch.Generator) -> Metrics:
        """Learn from an episode's observations (L *S) when it has ended; nothing unless an agent does."""
        return {}

    def diagnose(self, segment: Segment, *, generator: torch.Generator) -> Metrics:
        """Named numbers about what is being learned, at each evaluation; nothing unless an agent has some."""
        return {}

    def value_calibration(self, obs: Observations, actions: Actions, returns: Rows) -> Metrics:
        """The estimated value of (obs, action) of an evaluation (N) beside the discounted returns that followed."""
        return {}

    @abstractmethod
    def training_state(self) -> dict[str, Any]:
        """Optimisers, counters and kept plans: with `state_dict()`, all that a resumed run needs."""

    @abstractmethod
    def load_training_state(self, state: dict[str, Any]) -> None:
        """Put it back. Raises CheckpointError if it is another agent's."""
