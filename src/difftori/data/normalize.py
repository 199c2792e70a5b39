"""Normalisers: shift and scale per dimension, fitted on training data only, and kept with a policy's weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from difftori.data.trajectories import Trajectories
from difftori.errors import DataError, ShapeError
from difftori.types import AnyActions, EntrySpec, Moments, TaskSpec, Window

FLAT = 1e-4
"""A dimension that spans less than this over the training data counts as constant, as in Diffusion Policy."""


def measure(blocks: Iterable[Shaped[Tensor, "... D"]]) -> Moments:
    """The moments of the last dimension, over all others and over all blocks, in one pass.

    Blocks are merged by their means and deviations, so that nothing cancels (Chan et al., 1983).
    Raises DataError if there is no block.
    """
    count, whole = 0, None
    for block in blocks:
        rows = block.reshape(-1, block.shape[-1]).double().cpu()
        own = torch.stack((rows.amin(0), rows.amax(0), rows.mean(0), rows.std(0, correction=0)))
        whole = own if whole is None else _merge(whole, count, own, len(rows))
        count += len(rows)
    if whole is None:
        raise DataError("normalise: there is no data to fit to")
    return Moments(*(tuple(row) for row in whole.tolist()))


@final
class Affine(nn.Module):
    """y = (x − shift) / scale over the last dimension D, and back; leading dimensions are free, D = 1 fits all.

    `shift` and `scale` (D) are buffers: they go where the policy goes and are saved with it. Made from data by
    `min_max`, `mean_std` or `identity`; another state of the same D can be loaded.
    """

    def __init__(self, shift: Shaped[Tensor, "D"], scale: Shaped[Tensor, "D"]):
        super().__init__()
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", shift.detach().float().clone())
        self.register_buffer("scale", scale.detach().float().clone())

    def forward(self, values: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Normalised (… D). Raises ShapeError for another D."""
        return (self._fitting(values) - self.shift) / self.scale

    def inverse(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Back in the task's own units (… D). Raises ShapeError for another D."""
        return self._fitting(values) * self.scale + self.shift

    def _fitting(self, values: Tensor) -> Tensor:
        if values.ndim == 0 or len(self.scale) not in (1, values.shape[-1]):
            raise ShapeError(
                f"normalise: values of shape {tuple(values.shape)}, and the normaliser was made for "
                f"{len(self.scale)} dimensions; give (… {len(self.scale)})"
            )
        return values


def _merge(one: Float[Tensor, "4 D"], rows: int, other: Float[Tensor, "4 D"], more: int) -> Float[Tensor, "4 D"]:
    """Low, high, mean and deviation of both, which stand for so many rows each."""
    share, delta = more / (rows + more), other[2] - one[2]
    variance = (1 - share) * one[3].square() + share * other[3].square() + share * (1 - share) * delta.square()
    low, high = torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])
    return torch.stack((low, high, one[2] + share * delta, variance.sqrt()))


Rule: TypeAlias = Callable[[Moments], Affine]
"""How a normaliser follows from the training data: `min_max`, `mean_std`, `identity`, or a function of one's own."""


def min_max(moments: Moments) -> Affine:
    """[least, greatest] of each dimension to [−1, 1]; a constant dimension (see `FLAT`) to 0, without scaling."""
    low, high = _numbers(moments.low), _numbers(moments.high)
    return Affine((low + high) / 2, torch.where(high - low < FLAT, 1.0, (high - low) / 2))


def mean_std(moments: Moments) -> Affine:
    """Mean 0 and standard deviation 1 in each dimension; a constant one (see `FLAT`) to 0, without scaling."""
    flat = _numbers(moments.high) - _numbers(moments.low) < FLAT
    return Affine(_numbers(moments.mean), torch.where(flat, 1.0, _numbers(moments.std)))


def identity(moments: Moments) -> Affine:
    """Nothing changes."""
    return Affine(torch.zeros(len(moments.mean)), torch.ones(len(moments.mean)))


def _numbers(values: tuple[float, ...]) -> Float[Tensor, "D"]:
    return torch.tensor(values, dtype=torch.float64)


def pixels() -> Affine:
    """uint8 to [0, 1]: y = x / 255."""
    return Affine(torch.zeros(1), torch.full((1,), 255.0))


@final
class Normalizer(nn.Module):
    """One `Affine` for each entry of the observations and one for the actions.

    `fit_normalizer` makes it. A policy that is to load a saved one builds it with any values of the right sizes first.
    """

    def __init__(self, obs: Mapping[str, Affine], actions: Affine):
        super().__init__()
        # The prefix keeps entries such as "keys" or "type" apart from the module's own names.
        self.obs = nn.ModuleDict({f"obs_{name}": affine for name, affine in obs.items()})
        self.actions = actions

    @staticmethod
    def of(spec: TaskSpec, *, obs: "Rule | None" = None, actions: "Rule | None" = None) -> "Normalizer":
        """That of a task's training data; `min_max` by default, and images are divided by 255.

        Where the spec has no moments, vectors stay what they are and actions are brought from their box to [−1, 1].
        """
        affines = {name: _entry_affine(entry, obs or min_max) for name, entry in spec.obs.items()}
        rule = actions or min_max
        return Normalizer(affines, rule(spec.moments or Moments(spec.low, spec.high, spec.low, spec.high)))

    def forward(self, window: Window) -> Window:
        """The window with observations and actions normalised, the base's too."""
        base = None if window.base is None else self.normalize_actions(window.base)
        return Window(self.normalize_obs(window.obs), self.normalize_actions(window.actions), window.index, base)

    def normalize_obs(self, obs: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, Float[Tensor, "..."]]:
        """Each entry (… D) by its own normaliser; not all that were fitted need be there.

        Raises DataError for an entry that was not fitted.
        """
        unknown = [name for name in obs if f"obs_{name}" not in self.obs]
        if unknown:
            known = ", ".join(name.removeprefix("obs_") for name in self.obs)
            raise DataError(f"normalise: the entry {unknown[0]!r} was not in the training data, which had {known}")
        return {name: self.obs[f"obs_{name}"](values) for name, values in obs.items()}

    def normalize_actions(self, actions: AnyActions) -> AnyActions:
        """Actions (… A) as the policy sees them."""
        return self.actions(actions)

    def denormalize_actions(self, actions: AnyActions) -> AnyActions:
        """Actions (… A) in the task's own units."""
        return self.actions.inverse(actions)


def _entry_affine(entry: EntrySpec, rule: Rule) -> Affine:
    if entry.dtype == "uint8":
        return pixels()
    size = entry.shape[-1]
    return Affine(torch.zeros(size), torch.ones(size)) if entry.moments is None else rule(entry.moments)


def measured_spec(
    train: Trajectories,
    *,
    low: tuple[float, ...],
    high: tuple[float, ...],
    n_obs_steps: int,
    horizon: int,
    n_action_steps: int,
) -> TaskSpec:
    """The task of imitating these episodes, measured at every step of them: hand in the training part alone.

    Statistics run over the last dimension of an entry, so all points of a cloud (T N 3) share theirs; images have none.
    `low` and `high` bound the actions, A numbers each; the rest is `TaskSpec`'s.
    """
    obs = {
        name: EntrySpec(
            tuple(values.shape[1:]),
            "uint8" if values.dtype == torch.uint8 else "float32",
            None if values.dtype == torch.uint8 else measure(train.blocks(values)),
        )
        for name, values in train.obs.items()
    }
    actions = measure(train.blocks(train.actions))
    return TaskSpec(obs, train.actions.shape[1], horizon, low, high, n_obs_steps, n_action_steps, actions)


def fit_normalizer(
    train: Trajectories,
    *,
    obs: Rule = min_max,
    actions: Rule = min_max,
    entries: Mapping[str, Rule] | None = None,
) -> Normalizer:
    """Fit to every step of these episodes: hand in the training part alone.

    Statistics run over the last dimension of an entry, so all points of a cloud (T N 3) share theirs. `entries` names
    entries that follow a rule of their own; without one, uint8 entries are divided by 255, and the others follow `obs`.
    Raises DataError if `entries` names what is not there.
    """
    own = dict(entries or {})
    unknown = [name for name in own if name not in train.obs]
    if unknown:
        raise DataError(f"normalise: there is no entry {unknown[0]!r}; the data has {', '.join(train.obs)}")
    fitted = {}
    for name, values in train.obs.items():
        if name not in own and values.dtype == torch.uint8:
            fitted[name] = pixels()
        else:
            fitted[name] = own.get(name, obs)(measure(train.blocks(values)))
    return Normalizer(fitted, actions(measure(train.blocks(train.actions))))
