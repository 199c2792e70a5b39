"""Normalisers: shift and scale per dimension, fitted to training data only, and saved with a policy's weights."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from difftori.data.trajectories import Trajectories
from difftori.errors import DataError, ShapeError
from difftori.types import AnyActions, EntrySpec, Moments, TaskSpec, Window

FLAT = 1e-4
"""A dimension whose range over the training data is below this is treated as constant, as in Diffusion Policy."""
_ROUNDING = 1e-7
_log = logging.getLogger(__name__)


def measure(blocks: Iterable[Shaped[Tensor, "... D"]]) -> Moments:
    """Compute the moments of the last dimension over all other dimensions and all blocks, in one pass.

    Blocks are merged by their means and deviations, which avoids cancellation (Chan et al., 1983).
    Raises DataError if there is no block.
    """
    count, whole = 0, None
    for block in blocks:
        rows = block.reshape(-1, block.shape[-1]).double().cpu()
        own = torch.stack((rows.amin(0), rows.amax(0), rows.mean(0), rows.std(0, correction=0)))
        whole = own if whole is None else _merge(whole, count, own, len(rows))
        count += len(rows)
    if whole is None:
        raise DataError("normalise: there is no data to fit to. Fix: pass at least one episode")
    return Moments(*(tuple(row) for row in whole.tolist()))


@final
class Affine(nn.Module):
    """y = (x − shift) / scale over the last dimension D, and its inverse. Any leading dimensions; D = 1 fits every size.

    Dimensions that are `constant` in the data (D, default: none) have scale 1, and their inverse is `shift` whatever y is. All three are
    buffers, which move to devices. `min_max`, `mean_std` and `identity` compute them from data. A state of the same D can be loaded.
    """

    def __init__(
        self, shift: Shaped[Tensor, "D"], scale: Shaped[Tensor, "D"], constant: Shaped[Tensor, "D"] | None = None
    ):
        super().__init__()
        self.shift: Tensor
        self.scale: Tensor
        self.constant: Tensor
        constant = torch.zeros_like(scale, dtype=torch.bool) if constant is None else constant
        self.register_buffer("shift", shift.detach().float().clone())
        self.register_buffer("scale", torch.where(constant, 1.0, scale).detach().float().clone())
        self.register_buffer("constant", constant.clone())

    def forward(self, values: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Normalise values (… D). Raises ShapeError for a different D."""
        return (self._fitting(values) - self.shift) / self.scale

    def inverse(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Convert normalised values (… D) to the task's own units. Raises ShapeError for a different D."""
        return self._fitting(values) * self.scale.masked_fill(self.constant, 0.0) + self.shift

    def _fitting(self, values: Tensor) -> Tensor:
        if values.ndim == 0 or len(self.scale) not in (1, values.shape[-1]):
            raise ShapeError(
                f"normalise: values of shape {tuple(values.shape)}, but the normaliser was made for "
                f"{len(self.scale)} dimensions. Fix: pass (… {len(self.scale)})"
            )
        return values


def _merge(one: Float[Tensor, "4 D"], rows: int, other: Float[Tensor, "4 D"], more: int) -> Float[Tensor, "4 D"]:
    """Merge low, high, mean and deviation of `rows` rows (`one`) and of `more` rows (`other`)."""
    share, delta = more / (rows + more), other[2] - one[2]
    variance = (1 - share) * one[3].square() + share * other[3].square() + share * (1 - share) * delta.square()
    low, high = torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])
    return torch.stack((low, high, one[2] + share * delta, variance.sqrt()))


Rule: TypeAlias = Callable[[Moments], Affine]
"""Computes a normaliser from training data: `min_max`, `mean_std`, `identity`, or your own function."""


def min_max(moments: Moments) -> Affine:
    """Map [minimum, maximum] of each dimension to [−1, 1], and a constant dimension (see `FLAT`) to 0 without scaling."""
    low, high = _numbers(moments.low), _numbers(moments.high)
    return Affine((low + high) / 2, (high - low) / 2, high - low < FLAT)


def mean_std(moments: Moments) -> Affine:
    """Map each dimension to mean 0 and standard deviation 1, and a constant one (see `FLAT`) to 0 without scaling."""
    flat = _numbers(moments.high) - _numbers(moments.low) < FLAT
    return Affine(_numbers(moments.mean), _numbers(moments.std), flat)


def identity(moments: Moments) -> Affine:
    """Leave values unchanged."""
    return Affine(torch.zeros(len(moments.mean)), torch.ones(len(moments.mean)))


def _numbers(values: tuple[float, ...]) -> Float[Tensor, "D"]:
    return torch.tensor(values, dtype=torch.float64)


def pixels() -> Affine:
    """Map uint8 to [0, 1]: y = x / 255."""
    return Affine(torch.zeros(1), torch.full((1,), 255.0))


def unit(moments: Moments) -> Affine:
    """Map [minimum, maximum] of each channel of float images, such as depth, to [0, 1], and a constant channel to 0."""
    low, high = _numbers(moments.low), _numbers(moments.high)
    return Affine(low, high - low, high - low < FLAT)


@final
class Normalizer(nn.Module):
    """One `Affine` for each entry of the observations and one for the actions.

    `fit_normalizer` creates it. To load a saved one, first create a normaliser with any values of the right sizes.
    """

    def __init__(self, obs: Mapping[str, Affine], actions: Affine):
        super().__init__()
        # The prefix keeps entries such as "keys" or "type" apart from the module's own names.
        self.obs = nn.ModuleDict({f"obs_{name}": affine for name, affine in obs.items()})
        self.actions = actions

    @staticmethod
    def of(spec: TaskSpec, *, obs: "Rule | None" = None, actions: "Rule | None" = None) -> "Normalizer":
        """Create the normaliser of a task's training data. Default rule: `min_max`; images are mapped to [0, 1], those of bytes divided by 255.

        If the spec has no moments, vectors are unchanged and actions are mapped from their box to [−1, 1].
        """
        affines = {name: _entry_affine(entry, obs or min_max) for name, entry in spec.obs.items()}
        rule = actions or min_max
        if spec.moments is None:
            boxed = rule(Moments(spec.low, spec.high, spec.low, spec.high))
            return Normalizer(affines, Affine(boxed.shift, boxed.scale))  # a narrow box is not constant data
        return Normalizer(affines, rule(spec.moments))

    def forward(self, window: Window) -> Window:
        """Normalise the observations and actions of a window, including the base actions."""
        base = None if window.base is None else self.normalize_actions(window.base)
        return Window(self.normalize_obs(window.obs), self.normalize_actions(window.actions), window.index, base)

    def normalize_obs(self, obs: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, Float[Tensor, "..."]]:
        """Normalise each entry (… D) with its own normaliser. `obs` may have fewer entries than were fitted.

        Raises DataError for an entry that was not fitted.
        """
        unknown = [name for name in obs if f"obs_{name}" not in self.obs]
        if unknown:
            known = ", ".join(name.removeprefix("obs_") for name in self.obs)
            raise DataError(
                f"normalise: the entry {unknown[0]!r} was not in the training data, which had {known}. Fix: omit it"
            )
        return {name: self.obs[f"obs_{name}"](values) for name, values in obs.items()}

    def normalize_actions(self, actions: AnyActions) -> AnyActions:
        """Normalise actions (… A) for the policy."""
        return self.actions(actions)

    def denormalize_actions(self, actions: AnyActions) -> AnyActions:
        """Convert normalised actions (… A) to the task's own units."""
        return self.actions.inverse(actions)


def _entry_affine(entry: EntrySpec, rule: Rule) -> Affine:
    if entry.dtype == "uint8":
        return pixels()
    size = entry.shape[-1]
    if entry.moments is None:
        return Affine(torch.zeros(size), torch.ones(size))
    return unit(entry.moments) if len(entry.shape) == 3 else rule(entry.moments)


def measured_spec(
    train: Trajectories,
    *,
    low: tuple[float, ...],
    high: tuple[float, ...],
    n_obs_steps: int,
    horizon: int,
    n_action_steps: int,
) -> TaskSpec:
    """Create the `TaskSpec` of imitating these episodes, with statistics over all their steps. Pass the training part only.

    Statistics are per last dimension of an entry, so all points of a cloud (T N 3) share them; images have none. `low` and
    `high` are the bounds of the actions, A numbers each. See `TaskSpec` for the other arguments.
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
    ranges = [b - a for a, b in zip(actions.low, actions.high, strict=True)]
    if small := [f"{number} ({size:g})" for number, size in enumerate(ranges) if _ROUNDING < size < FLAT]:
        _log.warning(
            "demos: the range of the actions is below %g in dimension %s. It is treated as constant and not learned. Fix: record "
            "it in a smaller unit",
            FLAT,
            ", ".join(small),
        )
    return TaskSpec(obs, train.actions.shape[1], horizon, low, high, n_obs_steps, n_action_steps, actions)


def fit_normalizer(
    train: Trajectories,
    *,
    obs: Rule = min_max,
    actions: Rule = min_max,
    entries: Mapping[str, Rule] | None = None,
) -> Normalizer:
    """Fit a normaliser to every step of these episodes. Pass the training part only.

    Statistics are per last dimension of an entry, so all points of a cloud (T N 3) share them. `entries` maps entries to
    their own rules. Default: uint8 entries are divided by 255, float images (T height width C) are mapped to [0, 1], the
    others use the rule `obs`. Raises DataError if `entries` names an entry that does not exist.
    """
    own = dict(entries or {})
    unknown = [name for name in own if name not in train.obs]
    if unknown:
        raise DataError(f"normalise: there is no entry {unknown[0]!r}. Fix: choose from {', '.join(train.obs)}")
    fitted = {}
    for name, values in train.obs.items():
        if name not in own and values.dtype == torch.uint8:
            fitted[name] = pixels()
        else:
            fitted[name] = own.get(name, unit if values.ndim == 4 else obs)(measure(train.blocks(values)))
    return Normalizer(fitted, actions(measure(train.blocks(train.actions))))
