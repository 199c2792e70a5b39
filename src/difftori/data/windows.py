"""Windows of demonstrations: the last observations and the actions around them. A window never crosses episodes."""

from collections.abc import Iterator
from typing import final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from difftori.data._columns import Column
from difftori.data.trajectories import Trajectories
from difftori.errors import ConfigError, ShapeError
from difftori.types import RowCounts, Window


@final
class Windows:
    """All windows of a set of episodes: O observations (`n_obs_steps`) and H actions (`horizon`) from the same step on.

    Windows are those of Diffusion Policy (Chi et al., 2023): in an episode of L steps, one window begins at each step from
    −(O − 1) to L − H + `n_action_steps` − 1. Observations and actions before the first step repeat the first, and those
    after the last step repeat the last. The present is the O-th step of a window; a policy that observes it executes
    `n_action_steps` actions from there on.
    Differs from Diffusion Policy: an episode that is too short for any window gives one, with the first step as the
    present; Diffusion Policy skips it.

    `device` is the device of the batches; default: the device of the demonstrations. Windows are numbered through all
    episodes (`index`). Raises ConfigError listing every invalid setting.
    """

    def __init__(
        self,
        demos: Trajectories,
        *,
        n_obs_steps: int,
        horizon: int,
        n_action_steps: int,
        device: torch.device | str | None = None,
    ):
        faults = [
            f"windows: {name} is {value}; it must be at least 1"
            for name, value in (("n_obs_steps", n_obs_steps), ("horizon", horizon), ("n_action_steps", n_action_steps))
            if value < 1
        ]
        if not faults and n_obs_steps - 1 + n_action_steps > horizon:
            faults.append(
                f"windows: a window has {horizon} actions, too few to execute {n_action_steps} from the last of {n_obs_steps} "
                f"observations on. Fix: make horizon at least {n_obs_steps - 1 + n_action_steps}"
            )
        here = demos.actions.device
        self.device = here if device is None else torch.device(device)
        if here.type != "cpu" and self.device != here:
            faults.append(
                f"windows: the demonstrations are on {here} and the batches on {self.device}. Fix: choose one device"
            )
        if faults:
            raise ConfigError(faults)

        self.demos, self.n_obs_steps, self.horizon, self.n_action_steps = demos, n_obs_steps, horizon, n_action_steps
        spans = demos.spans.cpu().numpy()
        first = 1 - n_obs_steps
        counts = np.maximum(np.diff(spans)[:, 0] - horizon + n_action_steps - first, 1)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._episode = np.repeat(np.arange(len(spans)), counts)
        self._first = spans[self._episode, 0] + first + within
        self._low, self._high = spans[self._episode, 0], spans[self._episode, 1] - 1
        self._columns = {name: self._column(values) for name, values in demos.obs.items()}
        self._actions = self._column(demos.actions)

    def __len__(self) -> int:
        return len(self._first)

    def episodes(self, index: RowCounts) -> RowCounts:
        """Return the episode of each of these windows, on the CPU."""
        return torch.from_numpy(self._episode[self._checked(index)])

    def batch(self, index: RowCounts) -> Window:
        """Return the windows of these indices. Raises ShapeError if an index is out of range."""
        chosen = self._checked(index)
        obs = {
            name: self._gather(column, chosen, self.n_obs_steps).unflatten(-1, self.demos.obs[name].shape[1:])
            for name, column in self._columns.items()
        }
        return Window(obs, self._gather(self._actions, chosen, self.horizon), index.to(self.device))

    def sample(self, batch_size: int, generator: torch.Generator) -> Window:
        """Sample `batch_size` windows uniformly, with replacement. `generator` is a CPU generator."""
        return self.batch(torch.randint(len(self), (_at_least_one(batch_size),), generator=generator))

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Window]:
        """Iterate once over all windows in random order; the last batch may be smaller.

        `generator` is a CPU generator. The whole order is sampled from it when the first batch is requested.
        """
        order = torch.randperm(len(self), generator=generator)
        for index in order.split(_at_least_one(batch_size)):
            yield self.batch(index)

    def in_order(self, batch_size: int = 256) -> Iterator[Window]:
        """Iterate once over all windows in order."""
        for index in torch.arange(len(self)).split(_at_least_one(batch_size)):
            yield self.batch(index)

    def _column(self, values: Tensor) -> Column:
        return Column(values.reshape(len(values), -1), self.device)

    def _gather(self, column: Column, chosen: Int[np.ndarray, "B"], count: int) -> Tensor:
        """Return `count` steps from each window's first, (B count width). Steps outside of the episode are clipped into it."""
        steps = self._first[chosen, None] + np.arange(count)
        steps = np.clip(steps, self._low[chosen, None], self._high[chosen, None])
        return column.gather(steps.reshape(-1)).unflatten(0, (len(chosen), count))

    def _checked(self, index: RowCounts) -> Int[np.ndarray, "B"]:
        chosen = index.cpu().numpy()
        wrong = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(wrong):
            raise ShapeError(f"windows: there is no window {wrong[0]}. Fix: choose from 0 to {len(self) - 1}")
        return chosen


def _at_least_one(batch_size: int) -> int:
    if batch_size < 1:
        raise ConfigError([f"windows: batch_size is {batch_size}; it must be at least 1"])
    return batch_size
