"""Interfaces of policies (imitation learning) and agents (reinforcement learning)."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from difftori.errors import CheckpointError
from difftori.optim import GuardedOptimizer
from difftori.types import (
    Actions,
    EnvSpec,
    Metrics,
    Observations,
    Plans,
    RowFlags,
    Rows,
    Scalar,
    Scalars,
    Segment,
    TaskSpec,
    Window,
    WindowObs,
)

Steerable: TypeAlias = Literal["none", "cost", "cost and constraint"]


class Settings(BaseModel):
    """Settings of a policy or an agent. They are immutable, and an unknown name raises an error.

    `PRESETS`: named sets of defaults. They apply to settings that are not set explicitly.
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
            raise ValueError(f"preset {name!r} is unknown. Fix: use one of {', '.join(cls.PRESETS)}")
        return {**cls.PRESETS[name], **values}


class PolicyConfig(Settings):
    """Base class of the settings of all policies, with the settings that trainers read. Each policy sets the defaults of its source."""

    optimizer: Literal["adam", "adamw", "rmsprop"] = "adam"
    """Optimizer: `adam`, `adamw` or `rmsprop`."""
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate schedule. `cosine` falls to zero over `epochs`, or over `updates` if set."""
    warmup: int = Field(default=0, ge=0)
    """Number of updates over which the learning rate rises linearly from zero."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight decay, decoupled for `adamw`."""
    rmsprop_alpha: float = Field(default=0.99, ge=0, lt=1)
    """Smoothing constant of the squared gradients of `rmsprop`."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the average gradient of `adam` and `adamw`."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of the average squared gradient of `adam` and `adamw`."""
    epochs: int = Field(default=250, ge=1)
    """Number of passes over the training set."""
    updates: int | None = Field(default=None, ge=1)
    """Number of updates, instead of `epochs`; the last epoch is cut short. Default: `epochs` applies."""
    batch_size: int = Field(default=32, ge=1)
    """Number of demonstration windows per update."""
    clip_norm: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """Largest norm of a gradient; longer ones are scaled down to it. 0: no clipping."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Largest decay of the exponential moving average (EMA) of the weights, which is used for inference. The decay at update
    t is 1 − (1 + t)^−3/4 (Chi et al., 2023, use .9999). 0: the last weights are used."""


class Policy(nn.Module, ABC):
    """Maps the last O observations to actions, and computes its training loss.

    A policy gets normalised observations and actions: `NormalizedPolicy` converts the units of a task for all policies. A
    concrete policy lives in one file of `difftori.policies`, sets `name` and `Config`, and is built as
    `SomePolicy(config, spec)`. It is found by walking the package: there is no registry to edit.
    """

    name: ClassVar[str]
    Config: ClassVar[type[PolicyConfig]]
    WINDOW: ClassVar[tuple[int, int, int] | None] = None
    """Default `n_obs_steps`, `horizon` and `n_action_steps`. None: the task's defaults apply."""
    STOCHASTIC: ClassVar[bool] = False
    """Whether `act` samples (a stochastic policy)."""
    NORMALIZES: ClassVar[Literal["all", "observations", "nothing"]] = "all"
    """Values that are scaled from the range of the training data to [−1, 1]. Actions without data are scaled from their box."""
    FROM_PRESENT: ClassVar[bool] = False
    """Whether the policy gets and returns actions from the present step on, (B P A), instead of all H of a window (B H A)."""
    STEERABLE: Steerable = "none"
    """What `act` plans with if it gets `steering`, of the class or one of its settings. `none`: it never gets it, and its finished plan is
    projected (`difftori.steering`)."""

    def __init__(self, config: PolicyConfig, spec: TaskSpec):
        super().__init__()
        self.config = config
        self.spec = spec
        self.stochastic = self.STOCHASTIC
        """Whether `act` samples with the current settings."""

    @abstractmethod
    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """The training loss of a batch, ready for `backward`, and named numbers to log.

        They may have a graph, and stay on the device: the trainer reads all of them at once.
        """

    @abstractmethod
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """The actions (B H A) from the oldest observation on, or (B P A) with `FROM_PRESENT`, without a graph.

        The actions in `spec.present` are executed.
        """

    def trainable(self, epoch: int) -> Iterable[Tensor]:
        """The parameters to update in this epoch. Default: all parameters."""
        return self.parameters()


@runtime_checkable
class Dataset(Protocol):
    """A dataset of training windows."""

    def __len__(self) -> int:
        """The number of windows."""
        ...

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Window]:
        """One pass in random order. `generator` is on the CPU."""
        ...

    def in_order(self, batch_size: int = ...) -> Iterator[Window]:
        """One pass in order."""
        ...


class AgentConfig(Settings):
    """Base class of the settings of all agents, with the settings that the trainer reads."""

    model_config = ConfigDict(allow_inf_nan=False)
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}}

    preset: str = "paper"
    """Set of default settings: `paper`, or another preset of the agent. Settings that you set explicitly take precedence."""
    horizon: int = Field(default=5, ge=1)
    """T, the steps of a recorded segment, and H, the largest planning horizon."""
    batch_size: int | None = Field(default=None, ge=1)
    """Segments per update. Default: chosen by the agent."""
    seed_steps: int = Field(default=5000, ge=0)
    """Random agent steps before the first update. The same number of updates follows at once."""
    updates_per_step: float = Field(default=1.0, gt=0)
    """Updates per agent step after `seed_steps`. They are made at the end of an episode."""
    priority_alpha: float = Field(default=0.6, ge=0, le=1)
    """Exponent α of the priorities of prioritised replay. 0: uniform replay."""


Memory: TypeAlias = dict[str, Tensor]
"""State of an agent between agent steps, rows first, such as the plan that warm-starts the next solve."""


class ActingSchedule(NamedTuple):
    """What actions take from the number of agent steps: `fixed`, such as the planning horizon, and the scheduled `std` of the noise."""

    fixed: Hashable
    std: float


class LearningSchedule(NamedTuple):
    """What the next `update`, and the next `end_episode`, take from the number of updates. None: `end_episode` does nothing."""

    update: Hashable
    end_episode: Hashable | None = None


class Agent(nn.Module, ABC):
    """Acts in a vector of environments and learns from recorded segments, with its own optimizers.

    A concrete agent lives in one file of `difftori.agents`, sets `name` and `Config`, and is built as
    `SomeAgent(config, spec)`. All its random numbers come from the generators passed to its methods.
    """

    name: ClassVar[str]
    Config: ClassVar[type[AgentConfig]]
    STEERABLE: Steerable = "none"
    """What `act` plans with if it gets `steering`, of the class or one of its settings. `none`: it never gets it, and its finished plan is
    projected (`difftori.steering`)."""
    SHORT_SEGMENTS: ClassVar[bool] = False
    """Whether the agent learns from segments of fewer than T steps before a time limit too, as all do before a termination."""
    batch_size: int
    updates: int = 0
    """Number of updates so far."""
    compiles = False
    """Whether computations of fixed shape go through torch.compile. The trainer's `--compile` sets it."""

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
        std: Scalar | None = None,
    ) -> tuple[Actions, "Memory"]:
        """One action per environment, (B A) in [−1, 1], without a graph, and the memory to pass with the next observation.

        `first` (B): rows whose episode begins with `obs`; `memory` is not valid for them. `step`: number of agent steps so far
        in training, for schedules. `explore`: add exploration noise. `std`: `schedule`'s `std` as a tensor, which a CUDA graph
        reads anew at every replay; default: that of `step`. Agents without a `schedule` need no such argument.
        """

    def schedule(self, step: int) -> ActingSchedule | None:
        """What `act` takes from `step`. Actions of equal `fixed` are recorded once as a CUDA graph. Default: None, they never are."""
        return None

    @abstractmethod
    def update(self, segment: Segment, *, generator: torch.Generator) -> tuple[Rows, Scalars]:
        """Make one update on a batch. Returns new priorities (B) and named numbers to log, which stay on the device."""

    def end_episode(self, obs: Observations, *, generator: torch.Generator) -> Scalars:
        """Learn from the observations (L *S) of an episode that has ended. Returns named numbers to log. Default: nothing."""
        return {}

    def learning_schedule(self) -> LearningSchedule | None:
        """What learning takes from `updates`. Updates of equal schedules are recorded once as a CUDA graph. Default: None, they never are."""
        return None

    def diagnose(self, segment: Segment, *, generator: torch.Generator) -> Metrics:
        """Named numbers about the training, computed at each evaluation. Default: none."""
        return {}

    def value_calibration(self, obs: Observations, actions: Actions, returns: Rows) -> Metrics:
        """Compare the estimated value of (obs, action) of an evaluation (N) with the discounted returns that followed."""
        return {}

    @property
    @abstractmethod
    def optimizers(self) -> dict[str, GuardedOptimizer]:
        """All optimizers by name. The trainer stores their states, restores them after recording a CUDA graph, and checks for NaN."""

    def training_state(self) -> dict[str, Any]:
        """Optimizers and counters: with `state_dict()`, the complete state for resuming."""
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {**states, "updates": self.updates}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the training state. Raises CheckpointError if it belongs to another agent."""
        try:
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state[name])
            self.updates = int(state["updates"])
        except KeyError as error:
            raise CheckpointError(f"the checkpoint does not belong to {self.name!r}: it lacks {error}") from error
