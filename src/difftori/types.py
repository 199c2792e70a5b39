"""The shape letters of the whole library, and the few records that travel between its storeys.

B  rows: independent problems, never interacting      n  variables of one problem, n = H·A
H  horizon (steps of one plan)                        A  action dimension
S  state or observation dimension                     Z  latent dimension
r  residuals of one problem                           T  length of a recorded segment
K  members of an ensemble, samples or candidates      k  steps kept, for histories
T1 the T + 1 observations around T steps              O  observations of a window
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from difftori.errors import ShapeError

Scalar: TypeAlias = Float[Tensor, ""]
Rows: TypeAlias = Float[Tensor, "B"]
RowFlags: TypeAlias = Bool[Tensor, "B"]
RowCounts: TypeAlias = Int[Tensor, "B"]
Points: TypeAlias = Float[Tensor, "B n"]
PointSets: TypeAlias = Float[Tensor, "*K B n"]
PointSetFlags: TypeAlias = Bool[Tensor, "*K B n"]
PointFlags: TypeAlias = Bool[Tensor, "B n"]
Residuals: TypeAlias = Float[Tensor, "B r"]
Hessians: TypeAlias = Float[Tensor, "B n n"]
States: TypeAlias = Float[Tensor, "B S"]
Latents: TypeAlias = Float[Tensor, "B Z"]
Actions: TypeAlias = Float[Tensor, "B A"]
Plans: TypeAlias = Float[Tensor, "B H A"]
Observations: TypeAlias = Shaped[Tensor, "B *S"]
QValues: TypeAlias = Float[Tensor, "K B"]
# The same with any leading dimensions: steps of a slice, candidates of a row.
AnyObservations: TypeAlias = Shaped[Tensor, "..."]
AnyLatents: TypeAlias = Float[Tensor, "*B Z"]
AnyActions: TypeAlias = Float[Tensor, "*B A"]
AnyPlans: TypeAlias = Float[Tensor, "*B H A"]
AnyValues: TypeAlias = Float[Tensor, "*B"]
AnyQValues: TypeAlias = Float[Tensor, "K *B"]

Metrics: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class TaskSpec:
    """What a policy must know of a task: sizes and the action box, in the task's own units.

    `obs_dim` S, `action_dim` A, `horizon` H (actions that a policy returns at once), `low` and `high` per action
    dimension, A numbers each.
    """

    obs_dim: int
    action_dim: int
    horizon: int
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class EnvSpec:
    """What an agent must know of an environment to be built.

    `obs_shape` (*S) and `obs_dtype` ("uint8", "float32", …) of one row; `action_dim` A, each in [−1, 1]; `max_episode_steps` counts steps of the
    underlying environment, of which one decision takes `action_repeat`, and is None where nothing is promised.
    """

    name: str
    obs_shape: tuple[int, ...]
    obs_dtype: str
    action_dim: int
    max_episode_steps: int | None
    action_repeat: int

    @property
    def max_decisions(self) -> int | None:
        """Calls of `step` in the longest episode, ⌈max_episode_steps / action_repeat⌉."""
        return None if self.max_episode_steps is None else -(-self.max_episode_steps // self.action_repeat)


@dataclass(frozen=True)
class Chunk:
    """A batch of demonstrations: what was seen, and the H actions that the expert then took.

    `obs` (B S) or (B …), `actions` (B H A), both in the task's own units; `index` (B) says which example of the data
    set each row is, for policies that keep something per example (warm starts).
    """

    obs: Observations
    actions: Plans
    index: RowCounts

    def to(self, device) -> "Chunk":
        """The same batch on another device."""
        return Chunk(self.obs.to(device), self.actions.to(device), self.index.to(device))


@dataclass(frozen=True)
class Window:
    """A batch of windows of demonstrations: the last O observations, by name, and H actions of the same episode.

    `obs` maps names to (B O *S): float32 vectors and point clouds, uint8 pictures (B O height width channels). `actions`
    (B H A). Both begin at the same step, so that `actions[:, O - 1]` is what the expert did at the last observation.
    `index` (B) says which window of the data set each row is.
    """

    obs: dict[str, Shaped[Tensor, "B O ..."]]
    actions: Plans
    index: RowCounts

    def to(self, device) -> "Window":
        """The same batch on another device."""
        obs = {name: values.to(device) for name, values in self.obs.items()}
        return Window(obs, self.actions.to(device), self.index.to(device))

    def chunk(self) -> Chunk:
        """The same batch with all observations in one row, entry after entry, oldest first in each: (B O·ΣS).

        Raises ShapeError if pictures are among them.
        """
        pictures = [name for name, values in self.obs.items() if not values.is_floating_point()]
        if pictures or not self.obs:
            raise ShapeError(
                f"window: the entries {', '.join(pictures) or '(none)'} cannot stand in one row of numbers; read only "
                "float entries, or give the policy the window itself"
            )
        return Chunk(torch.cat([values.flatten(1) for values in self.obs.values()], 1), self.actions, self.index)


@dataclass(frozen=True)
class Segment:
    """A batch of recorded slices, T steps each, time first: what was seen, done, received, and where episodes ended.

    `obs` (T+1 B *S), uint8 stacked frames or float32 states; `actions` (T B A); `rewards` (T B). `terminated` (T B)
    is true where the episode ended by termination after that step, so that nothing is to be bootstrapped there; it is
    false where time ran out. `mask` (T B) is 1 for recorded steps and 0 for padding, which only episodes of fewer than
    T steps have, after their end: their last frame again, and zeros. `weights` (B) are the importance weights of
    prioritised sampling, at most 1; `index` (B) says where the slices start, for `Replay.update_priorities`.

    `obs` may be a view in which neighbouring steps share their frames: read it, and do not write into it.
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
            self.index.to(device),
        )
