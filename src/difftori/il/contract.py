"""The contract between demonstrations and environment: the same observations, by name, type and shape, and the same actions."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from difftori.data.trajectories import Trajectories
from difftori.errors import ConfigError
from difftori.types import TaskSpec

_log = logging.getLogger(__name__)

Bounds: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""The lowest and the highest value of each action dimension."""


@final
@dataclass(frozen=True)
class Shown:
    """An observation as an environment shows it: the shape of one step, images (height width C), and the dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_image(self) -> bool:
        """Whether it is an image of bytes."""
        return self.dtype == "uint8" and len(self.shape) == 3

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


def conform(demos: Trajectories, shown: Mapping[str, Shown], bounds: Bounds, *, place: str, env: str) -> Trajectories:
    """Return the demonstrations with observations as the environment shows them. `bounds` are those of its actions.

    Images are converted where they mean the same: channels last; floats from 0 to 1 (times 255, rounded), or integers from 0 to
    255, to bytes. `place` and `env` name the data and the environment in messages. Logs a warning if recorded actions are
    outside of the bounds. Raises ConfigError, naming both sides, for an observation of another shape or type, one that the
    environment does not show, and actions of another size.
    """
    obs, faults = {}, _action_faults(demos, len(bounds[0]), place, env)
    for name, values in demos.obs.items():
        found = Shown(tuple(values.shape[1:]), str(values.dtype).removeprefix("torch."))
        if name not in shown:
            names = ", ".join(f"{known} {what}" for known, what in shown.items())
            faults.append(
                f"demos: {place} has the observation {name!r} {found}, but {env} shows {names}. "
                "Fix: give the keys of these, --obs-keys NAME=KEY …"
            )
            continue
        fitted = _fitted(demos, values, shown[name])
        if fitted is None:
            faults.append(
                f"demos: the observation {name!r} of {place} is {found}, but {env} shows {shown[name]}. "
                f"Fix: read another key, --obs-keys {name}=KEY, choose another --obs, or change what the environment shows"
            )
            continue
        obs[name] = fitted
    if faults:
        raise ConfigError(faults)
    _warn_of_range(demos, bounds, place, env)
    return replace(demos, obs=obs)


def check_fit(spec: TaskSpec, shown: Mapping[str, Shown], bounds: Bounds, *, env: str) -> None:
    """Check that an environment shows the observations of a trained policy and takes its actions.

    Logs a warning if the policy's actions can be outside of the environment's bounds, which clip them. Raises ConfigError.
    """
    faults = []
    for name, entry in spec.obs.items():
        wanted = Shown(entry.shape, entry.dtype)
        found = shown.get(name)
        if found is None or not _alike(found, wanted):
            names = ", ".join(f"{known} {what}" for known, what in shown.items())
            faults.append(
                f"env: the policy needs the observation {name!r} {wanted}, but {env} shows {names}. "
                "Fix: choose another --obs or --env, or change what the environment shows"
            )
    if spec.action_dim != len(bounds[0]):
        faults.append(
            f"env: the policy has {spec.action_dim} actions, but {env} takes {len(bounds[0])}. Fix: choose another --env"
        )
    if faults:
        raise ConfigError(faults)
    ranges = zip(spec.low, spec.high, *bounds, strict=True)
    if any(
        low < own_low - 1e-3 * (high - low) or high > own_high + 1e-3 * (high - low)
        for low, high, own_low, own_high in ranges
    ):
        _log.warning(
            "env: the actions of the policy, low %s, high %s, can be outside of the bounds of %s, low %s, high %s, and are then "
            "clipped. Check that both have the same units",
            spec.low,
            spec.high,
            env,
            *bounds,
        )


def _alike(found: Shown, wanted: Shown) -> bool:
    """Whether an observation is of a policy's shape and kind; clouds may have any number of points."""
    if len(found.shape) == len(wanted.shape) == 2:
        return found.shape[1] == wanted.shape[1]
    return found.shape == wanted.shape and found.is_image == wanted.is_image


def _action_faults(demos: Trajectories, size: int, place: str, env: str) -> list[str]:
    found = demos.actions.shape[1]
    if found == size:
        return []
    return [
        f"demos: {place} has actions of size {found}, but {env} needs {size}. "
        "Fix: give demonstrations of this environment, or another key, --action-key KEY"
    ]


def _warn_of_range(demos: Trajectories, bounds: Bounds, place: str, env: str) -> None:
    low, high = torch.tensor(bounds[0]), torch.tensor(bounds[1])
    slack = 1e-3 * torch.where((high - low).isfinite(), high - low, 1.0)
    steps = outside = 0
    for block in demos.blocks(demos.actions):
        actions = block.cpu()
        beyond = (actions < low - slack) | (actions > high + slack)
        steps, outside = steps + len(actions), outside + int(beyond.any(1).sum())
    if outside:
        _log.warning(
            "demos: %.3g %% of the actions of %s are outside of the bounds of %s, low %s, high %s, and a policy's actions are "
            "clipped to these. Check that both have the same units",
            100 * outside / steps,
            place,
            env,
            *bounds,
        )


def _fitted(demos: Trajectories, values: Tensor, shown: Shown) -> Tensor | None:
    """Return the values in the shape and type that the environment shows; None if they cannot be converted."""
    shape = tuple(values.shape[1:])
    if len(shape) == 3 and shape != shown.shape and (*shape[1:], shape[0]) == shown.shape:
        values = values.permute(0, 2, 3, 1).contiguous()
    elif shape == (*shown.shape, 1) and len(shape) != 3:  # a depth image without a channel would be a cloud of points
        values = values.squeeze(-1)
    if tuple(values.shape[1:]) != shown.shape:
        return None
    if shown.is_image and values.dtype == torch.float32:
        return _as_bytes(replace(demos, obs={"image": values}))
    is_image = values.dtype == torch.uint8 and values.ndim == 4
    return values if is_image == shown.is_image else None


def _as_bytes(demos: Trajectories) -> Tensor | None:
    """Return float images as bytes: values from 0 to 1 times 255, rounded, or integers from 0 to 255; None for other values."""
    values = demos.obs["image"]
    low, high, whole = np.inf, -np.inf, True
    for block in demos.blocks(values):
        low, high = min(low, block.min().item()), max(high, block.max().item())
        whole = whole and bool((block == block.round()).all())
    if low < 0 or (high > 1 and not (whole and high <= 255)):
        return None
    scale = 255 if high <= 1 else 1
    return torch.cat([(part * scale).round().to(torch.uint8) for part in values.split(1024)])
