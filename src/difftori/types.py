"""The shape letters of the whole library, and the data classes that its layers exchange.

B  rows: independent problems, never interacting      n  variables of one problem, n = H·A
H  horizon (steps of one plan)                        A  action dimension
S  state or observation dimension                     Z  latent dimension
r  residuals of one problem                           T  length of a recorded segment
K  members of an ensemble, samples or candidates      k  recorded steps, in histories
T1 the T + 1 observations around T steps              O  observations of a window
P  those of H actions that are planned or executed    W  size of a sample used in place of the full set
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from difftori.errors import ShapeError

Count: TypeAlias = int | torch.SymInt
"""A number of rows or a size, symbolic while a function is traced for export."""
Scalar: TypeAlias = Float[Tensor, ""]
Rows: TypeAlias = Float[Tensor, "B"]
RowFlags: TypeAlias = Bool[Tensor, "B"]
RowCounts: TypeAlias = Int[Tensor, "B"]
Points: TypeAlias = Float[Tensor, "B n"]
PointSets: TypeAlias = Float[Tensor, "*K B n"]
PointSetFlags: TypeAlias = Bool[Tensor, "*K B n"]
PointFlags: TypeAlias = Bool[Tensor, "B n"]
PlanFlags: TypeAlias = Bool[Tensor, "B H A"]
Residuals: TypeAlias = Float[Tensor, "B r"]
Hessians: TypeAlias = Float[Tensor, "B n n"]
States: TypeAlias = Float[Tensor, "B S"]
Latents: TypeAlias = Float[Tensor, "B Z"]
Actions: TypeAlias = Float[Tensor, "B A"]
Plans: TypeAlias = Float[Tensor, "B H A"]
Samples: TypeAlias = Float[Tensor, "B W"]
PartPlans: TypeAlias = Float[Tensor, "B P A"]
PlanSamples: TypeAlias = Float[Tensor, "B K H A"]
Observations: TypeAlias = Shaped[Tensor, "B *S"]
QValues: TypeAlias = Float[Tensor, "K B"]
# The same with any leading dimensions: steps of a segment, candidates of a row.
AnyObservations: TypeAlias = Shaped[Tensor, "..."]
AnyLatents: TypeAlias = Float[Tensor, "*B Z"]
AnyActions: TypeAlias = Float[Tensor, "*B A"]
AnyPlans: TypeAlias = Float[Tensor, "*B H A"]
AnyPartPlans: TypeAlias = Float[Tensor, "*B P A"]
AnyValues: TypeAlias = Float[Tensor, "*B"]
AnyQValues: TypeAlias = Float[Tensor, "K *B"]

Metrics: TypeAlias = dict[str, float]
Scalars: TypeAlias = Mapping[str, Scalar | float]


@dataclass(frozen=True)
class Moments:
    """Minimum, maximum, mean and standard deviation (of the population) of each of D dimensions."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class EntrySpec:
    """One entry of the observations at one step: `shape` (*S), `dtype` "float32" or "uint8".

    Images are uint8 (height width channels), depth images float32 (height width 1), point clouds float32 (points 3) or more
    columns, vectors float32 (S).
    `moments` are those of the last dimension over the training data, or None if not measured.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    moments: Moments | None = None


@dataclass(frozen=True)
class TaskSpec:
    """The parts of a task that a policy depends on: observations, actions and their bounds, in the task's own units.

    `obs`: the entries by name; the policy gets the last `n_obs_steps` O steps of each. `horizon` H: the policy returns
    actions (H A), the first for the step of the oldest observation. The task executes `n_action_steps` of them from the
    present step on, `actions[:, O − 1 : O − 1 + n_action_steps]`. `low` and `high`: bounds of each action dimension, A
    numbers each. `moments`: those of the actions in the training data, or None if not measured.
    """

    obs: dict[str, EntrySpec]
    action_dim: int
    horizon: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    n_obs_steps: int = 1
    n_action_steps: int = 1
    moments: Moments | None = None

    @staticmethod
    def rows(
        obs_dim: int, action_dim: int, horizon: int, low: tuple[float, ...], high: tuple[float, ...]
    ) -> "TaskSpec":
        """A task with one vector `state` (S) as its observation, which executes all H actions from the present step on."""
        return TaskSpec({"state": EntrySpec((obs_dim,))}, action_dim, horizon, low, high, n_action_steps=horizon)

    @staticmethod
    def from_plain(values: dict[str, Any]) -> "TaskSpec":
        """Build a TaskSpec from the output of `dataclasses.asdict`. Raises KeyError or TypeError for any other value."""

        def moments(plain: dict[str, Any] | None) -> Moments | None:
            return None if plain is None else Moments(**plain)

        obs = {
            name: EntrySpec(**{**plain, "moments": moments(plain["moments"])}) for name, plain in values["obs"].items()
        }
        return TaskSpec(**{**values, "obs": obs, "moments": moments(values["moments"])})

    @property
    def obs_dim(self) -> int:
        """The length of all observations in one row, O·ΣS; see `flat_rows`. Raises ShapeError if there are images."""
        _reject_images([name for name, entry in self.obs.items() if entry.dtype == "uint8"], self.obs)
        return self.n_obs_steps * sum(math.prod(entry.shape) for entry in self.obs.values())

    @property
    def present(self) -> slice:
        """The slice of the H actions that is executed."""
        return slice(self.n_obs_steps - 1, self.n_obs_steps - 1 + self.n_action_steps)


@dataclass(frozen=True)
class EnvSpec:
    """The parts of an environment that an agent depends on.

    `obs_shape` (*S) and `obs_dtype` ("uint8", "float32", …) of one row; `action_dim` A, each in [−1, 1].
    `max_episode_steps` counts steps of the underlying environment; one agent step takes `action_repeat` of them. It is None
    if there is no limit. `action_bounds`: the environment's own lower and upper bounds, to which [−1, 1] is mapped; None if they
    are ±1. `flattened`: names and shapes of the arrays that were concatenated to the observation, of a Dict or with distractors; None
    if it is one array.
    """

    name: str
    obs_shape: tuple[int, ...]
    obs_dtype: str
    action_dim: int
    max_episode_steps: int | None
    action_repeat: int
    action_bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    flattened: tuple[tuple[str, tuple[int, ...]], ...] | None = None

    @property
    def task(self) -> str:
        """The name without its suite: `cheetah-run` of `dmc:cheetah-run`."""
        return self.name.partition(":")[2]

    @property
    def obs(self) -> dict[str, EntrySpec]:
        """The observation by name, as in `TaskSpec`: `state`."""
        return {"state": EntrySpec(self.obs_shape, self.obs_dtype)}

    @property
    def low(self) -> tuple[float, ...]:
        """The environment's own lower bounds of the actions (A)."""
        return (-1.0,) * self.action_dim if self.action_bounds is None else self.action_bounds[0]

    @property
    def high(self) -> tuple[float, ...]:
        """The environment's own upper bounds of the actions (A)."""
        return (1.0,) * self.action_dim if self.action_bounds is None else self.action_bounds[1]

    @property
    def max_agent_steps(self) -> int | None:
        """Agent steps of the longest episode, ⌈max_episode_steps / action_repeat⌉."""
        return None if self.max_episode_steps is None else -(-self.max_episode_steps // self.action_repeat)


WindowObs: TypeAlias = dict[str, Shaped[Tensor, "B O ..."]]
"""The last O observations of B rows by name: float32 vectors and clouds, uint8 images (B O height width channels)."""


@dataclass(frozen=True)
class Window:
    """A batch of windows of demonstrations: the last O observations, by name, and H actions of the same episode.

    Both begin at the same step, so `actions[:, O - 1]` (of (B H A)) is the expert's action at the last observation.
    All values are in the task's own units. `index` (B): the window of the data set in each row, for policies that store
    data per example. `base` (B K H A): K samples of the base policy's actions, for training a refiner.
    """

    obs: WindowObs
    actions: Plans
    index: RowCounts
    base: PlanSamples | None = None

    def to(self, device) -> "Window":
        """The same batch on another device."""
        base = None if self.base is None else self.base.to(device)
        return Window(to_device(self.obs, device), self.actions.to(device), self.index.to(device), base)

    def rows(self, chosen: RowCounts) -> "Window":
        """Some of the rows (C)."""
        obs = {name: values[chosen] for name, values in self.obs.items()}
        return Window(obs, self.actions[chosen], self.index[chosen], None if self.base is None else self.base[chosen])


def state_obs(states: States) -> WindowObs:
    """Observations of a task with one vector (B S) of the present step only, as for `TaskSpec.rows`."""
    return {"state": states[:, None]}


def to_device(obs: WindowObs, device) -> WindowObs:
    """The same observations on another device."""
    return {name: values.to(device) for name, values in obs.items()}


def flat_rows(obs: WindowObs) -> States:
    """All observations as one row of numbers, entry after entry, oldest first in each: (B O·ΣS).

    Raises ShapeError if there are images.
    """
    _reject_images([name for name, values in obs.items() if not values.is_floating_point()], obs)
    return torch.cat([values.flatten(1) for values in obs.values()], 1)


def _reject_images(images: list[str], entries: Collection[str]) -> None:
    if images or not entries:
        raise ShapeError(
            f"observations: the entries {', '.join(images) or '(none)'} cannot be flattened into one row of numbers. Fix: use float "
            "entries only, or a policy that reads images."
        )


@dataclass(frozen=True)
class Segment:
    """A batch of recorded segments of T steps, time first: observations, actions, rewards, and where episodes ended.

    `obs` (T+1 B *S), uint8 stacked frames or float32 states; `actions` (T B A); `rewards` (T B). `terminated` (T B) is true
    if the episode terminated at that step, so its target has no bootstrap value; it is false at a time limit. `mask` (T B) is
    1 for recorded steps and 0 for padding after the end of an episode: the last frame repeated, and zeros. `weights` (B): the
    importance weights of prioritised sampling, at most 1. `index` (B), always on the CPU: the start of each segment, for
    `Replay.update_priorities`.

    `obs` may be a view in which neighbouring steps share their frames: do not write into it.
    """

    obs: Shaped[Tensor, "T1 B *S"]
    actions: Float[Tensor, "T B A"]
    rewards: Float[Tensor, "T B"]
    terminated: Bool[Tensor, "T B"]
    mask: Float[Tensor, "T B"]
    weights: Rows
    index: RowCounts

    def to(self, device) -> "Segment":
        """The same batch on another device."""
        return Segment(
            self.obs.to(device),
            self.actions.to(device),
            self.rewards.to(device),
            self.terminated.to(device),
            self.mask.to(device),
            self.weights.to(device),
            self.index,
        )
