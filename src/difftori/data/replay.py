"""Prioritised replay buffer: stores episodes and samples segments of T steps by priority."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from difftori.data._columns import Column, Storage, free_bytes, make_rows
from difftori.data._episodes import Episode, EpisodeBuffer, Frames, as_finite, read_episode, write_episode
from difftori.data._sum_tree import SumTree
from difftori.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from difftori.types import RowCounts, Rows, Segment

State: TypeAlias = dict[str, Any]
"""Tensors, numbers, text, None, and lists and dictionaries of them."""

_FORMAT = 1
_EPS = 1e-6
_FLOAT = np.dtype(np.float32)
_OBS_TYPES = {"uint8": torch.uint8, "float32": torch.float32}


class DamagedEpisodeError(CheckpointError):
    """A checkpoint names an episode whose file is missing or damaged."""


@final
@dataclass
class _StoredEpisode:
    """A finished episode: the position of its first frame, its number of steps L, and the name of its file, if written."""

    start: int
    length: int
    name: str | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length + 1


@final
class Replay:
    """A ring buffer of whole episodes that samples segments of T steps in proportion to priority^α.

    P(i) = p_i^α / Σ_j p_j^α for N segments; weights (N·P(i))^−β, divided by their maximum in the batch. Samples are
    independent, with replacement (Schaul et al. 2016, Eq. 1, §3.4). As in TD-MPC (Hansen et al. 2022), the segments of a
    new episode get the greatest priority in the buffer, initially 1, and a segment starts only where its T steps fit, or with `short` at
    every step.
    Differs from paper, where all episodes have one length: the last steps of an episode that terminated, whose values nothing
    bootstraps, begin padded and masked segments too; and an episode of fewer than T steps is at least one such segment.

    `capacity` is the number of steps. When it is exceeded, the oldest episodes are removed, as a whole. The buffer holds
    5 % more observations than steps, because an episode has one more observation than steps. If episodes are shorter than
    20 steps on average, it holds fewer of them.

    `obs_shape` is the shape of the environment's observation: `stack` frames along the first dimension, oldest first. Only
    the newest frame is stored, once; the stacks are built on `device`. `obs_dtype` is uint8 or float32. `length` is T.
    `num_rows` is the number of environment rows that record at the same time. `storage` selects where observations and
    steps are stored: "memory", "device" (on `device`), "mmap", an unnamed file in `folder` (Linux), or "auto": "device" if that
    is a GPU with room for twice as much, otherwise "memory".

    Raises ConfigError listing every invalid setting, and DataError if there is no memory for `capacity` steps.
    """

    def __init__(
        self,
        capacity: int,
        *,
        obs_shape: tuple[int, ...],
        obs_dtype: Any,
        action_dim: int,
        length: int,
        stack: int = 1,
        num_rows: int = 1,
        alpha: float = 0.6,
        beta: float = 0.4,
        short: bool = False,
        storage: Storage | Literal["auto"] = "memory",
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        dtype = np.dtype(obs_dtype)
        sizes = {"capacity": capacity, "action_dim": action_dim, "length": length, "stack": stack, "num_rows": num_rows}
        faults = [f"replay: {name} is {value}; it must be at least 1" for name, value in sizes.items() if value < 1]
        if not obs_shape or min(obs_shape) < 1 or (stack > 0 and obs_shape[0] % stack):
            faults.append(f"replay: obs_shape is {obs_shape}; its first dimension must hold {stack} frames of one size")
        if dtype.name not in _OBS_TYPES:
            faults.append(f"replay: obs_dtype is {dtype}; it must be {' or '.join(_OBS_TYPES)}")
        if not (0 <= alpha <= 1 and 0 <= beta <= 1):
            faults.append(f"replay: alpha is {alpha} and beta {beta}; both must be from 0 to 1")
        if (storage == "mmap") != (folder is not None):
            faults.append(
                f"replay: storage is {storage!r} and folder {folder}. Fix: set folder if storage is 'mmap', and only then"
            )
        if faults:
            raise ConfigError(faults)

        self.capacity, self.length, self.action_dim = capacity, length, action_dim
        self.alpha, self.beta, self.short = alpha, beta, short
        self.device = torch.device(device)
        self._frames = Frames(tuple(obs_shape), dtype, stack)
        self._size = capacity + max(capacity // 20, 1)
        if storage == "auto":
            count = self._size * (self._frames.width * dtype.itemsize + (action_dim + 2) * _FLOAT.itemsize)
            storage = "device" if 2 * count < free_bytes(self.device) else "memory"
        place = {"storage": storage, "folder": folder, "device": self.device}
        rows = make_rows(self._size, self._frames.width, _OBS_TYPES[dtype.name], **place)
        self._obs = Column(rows, self.device)
        self._steps = Column(make_rows(self._size, action_dim + 2, torch.float32, **place), self.device)
        self._age = np.zeros(self._size, dtype=np.int32)  # steps since the episode began, of each slot
        self._left = np.zeros(self._size, dtype=np.int32)  # steps until it ended
        self._growing: list[EpisodeBuffer | None] = [None] * num_rows
        self._clear()

    def _clear(self) -> None:
        self._tree = SumTree(self._size)
        self._stored: deque[_StoredEpisode] = deque()
        self._head = 0  # positions count all frames ever written; a position's slot is its remainder by the size
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def begin(self, row: int, obs: np.ndarray) -> None:
        """Begin an episode of environment row `row` with its first observation: the whole stack, one frame repeated.

        Raises DataError if the row has an unfinished episode, the shape or dtype is wrong, or the frames differ; and
        NonFiniteError.
        """
        growing = self._growing[self._checked(row)]
        if growing is not None:
            raise DataError(
                f"replay, row {row}: an episode of {len(growing.steps)} steps has not ended. Fix: end it, or drop({row})"
            )
        frames = self._frames.split(obs, f"replay, row {row}, first observation")
        if (frames != frames[-1]).any():
            raise DataError(
                f"replay, row {row}: the first observation is not {self._frames.stack} equal frames. Fix: stack frames, beginning with "
                "copies of the first; for an environment registered with Gymnasium, --env gym:my_env:Id --obs pixels does this"
            )
        self._growing[row] = EpisodeBuffer([frames[-1].copy()])

    def add(
        self,
        row: int,
        action: np.ndarray,
        reward: float | np.floating,
        next_obs: np.ndarray,
        *,
        terminated: bool | np.bool_,
        truncated: bool | np.bool_,
    ) -> None:
        """Add one step of environment row `row`. A step that ends the episode makes the episode available to `sample`.

        `action` (A). `next_obs` is the observation after the step, also at the end of the episode: not the first one of the
        next episode. `terminated` takes precedence over `truncated`.

        Raises NonFiniteError, and DataError if no episode was begun, the episode is longer than the capacity, a shape or
        dtype is wrong, or frames do not continue the previous ones. The episode is then unchanged.
        """
        growing = self._growing[self._checked(row)]
        if growing is None:
            raise DataError(
                f"replay, row {row}: a step before the first observation. Fix: call begin({row}, obs) first"
            )
        place = f"replay, row {row}, step {len(growing.steps)}"
        if len(growing.steps) == self.capacity:
            raise DataError(
                f"{place}: the episode is longer than the capacity of {self.capacity} steps. Fix: raise capacity"
            )
        if np.shape(action) != (self.action_dim,):
            raise DataError(f"{place}: the action has shape {np.shape(action)}; it must be ({self.action_dim},)")
        action = as_finite(action, _FLOAT, "the action", place)
        reward = as_finite(reward, _FLOAT, "the reward", place).item()
        frames = self._frames.split(next_obs, place)
        past = growing.frames[-len(frames) :]
        past = [past[0]] * (len(frames) - len(past)) + past
        if any((frame != before).any() for frame, before in zip(frames[:-1], past[1:], strict=True)):
            raise DataError(
                f"{place}: the older frames of the next observation are not the previous ones. Fix: pass the observation after "
                "the step, not the first observation of the next episode"
            )
        growing.steps.append(np.array([*action, reward, terminated], dtype=_FLOAT))
        growing.frames.append(frames[-1].copy())
        if terminated or truncated:
            self._growing[row] = None
            self._commit(growing.end())

    def drop(self, row: int) -> None:
        """Discard the unfinished episode of environment row `row`, if there is one."""
        self._growing[self._checked(row)] = None

    def sample(self, batch_size: int, *, generator: torch.Generator) -> Segment:
        """Sample `batch_size` segments, on `device`. Their content does not change while they are in use.

        `generator` is a CPU generator. With its state and the buffer restored, the sample is the same.
        Raises DataError if there is no finished episode yet.
        """
        if self._count == 0 or batch_size < 1 or generator.device.type != "cpu":
            raise DataError(
                f"replay: cannot sample {batch_size} segments from {self._count} recorded steps with a generator on "
                f"{generator.device}. Fix: sample at least 1, after at least one whole episode, with a CPU generator"
            )
        mass = torch.rand(batch_size, dtype=torch.float64, generator=generator).numpy() * self._tree.total
        slots = self._tree.find(mass)
        leaves = self._tree.leaves[slots]
        weights = (leaves / leaves.min()) ** -self.beta
        age, left = self._age[slots], self._left[slots]
        time = np.arange(self.length)[:, None]
        mask = time < left
        step_slots = self._wrapped(slots + np.minimum(time, left - 1)).reshape(-1)
        # Everything that goes to the device goes in two copies: the slots to gather there, and the numbers known here.
        which = self._obs.to_rows(np.concatenate((self._frame_slots(slots, age, left), step_slots)))
        known = torch.from_numpy(np.vstack((mask, weights)).astype(_FLOAT)).to(self.device)
        present = known[:-1]
        frames, steps = self._obs.gather(which[: -len(step_slots)]), self._steps.gather(which[-len(step_slots) :])
        steps = steps.view(self.length, batch_size, -1) * present[..., None]
        tail = self._stored[0].start
        return Segment(
            obs=self._observations(frames, batch_size),
            actions=steps[..., :-2].contiguous(),
            rewards=steps[..., -2].contiguous(),
            terminated=steps[..., -1] > 0,
            mask=present,
            weights=known[-1],
            index=torch.from_numpy(tail + (slots - tail) % self._size),
        )

    def update_priorities(self, index: RowCounts, priorities: Rows) -> None:
        """Set the priorities (B), at least 0, of the segments with the positions `index` (B) of a `Segment`.

        10⁻⁶ is added, so that every segment can still be sampled. Segments of removed episodes are skipped.
        Raises NonFiniteError for NaN or Inf, and DataError for a priority below 0 or a position where no segment starts.
        """
        positions = index.detach().cpu().numpy()
        values = priorities.detach().cpu().double().numpy()
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise NonFiniteError(
                f"replay: {len(bad)} of {len(values)} priorities are NaN or Inf, first {values[bad[0]]} of row {bad[0]}. "
                "Fix: check the losses of that row"
            )
        alive = positions >= (self._stored[0].start if self._stored else self._head)
        slots = self._wrapped(positions[alive])
        faulty = (values[alive] < 0) | (positions[alive] >= self._head) | (self._tree.leaves[slots] == 0)
        if faulty.any():
            first = int(np.flatnonzero(alive)[faulty.argmax()])
            raise DataError(
                f"replay: row {first} sets the priority of the segment at {positions[first]} to {values[first]}; no "
                "segment starts there, or the priority is below 0. Fix: pass a Segment's index, and priorities of at least 0"
            )
        self._tree.set(slots, (values[alive] + _EPS) ** self.alpha)

    def save(self, folder: Path) -> State:
        """Write the episodes that are missing in `folder`, one file each, and return the state for a checkpoint.

        Files are never changed, so earlier states stay valid. The state contains the names of the files with their sha256,
        the priorities, the positions and the unfinished episodes. Raises CheckpointError if a file cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stored in self._stored:
                if stored.name is None or not (folder / stored.name).exists():
                    stored.name = write_episode(folder, stored.start, self._episode(stored))
        except OSError as error:
            raise CheckpointError(
                f"{folder}: an episode cannot be written ({error}); the episodes of earlier checkpoints are intact. "
                "Fix: free space on that disk, or choose another directory"
            ) from error
        live = self._live_slots()
        return {
            "format": _FORMAT,
            "settings": self._settings(),
            "episodes": [[stored.start, stored.length, stored.name] for stored in self._stored],
            "priorities": torch.from_numpy(self._tree.leaves[live]),
            "growing": [
                growing
                and {
                    "frames": torch.from_numpy(np.stack(growing.frames)),
                    "steps": torch.from_numpy(np.array(growing.steps, _FLOAT).reshape(-1, self.action_dim + 2)),
                }
                for growing in self._growing
            ],
        }

    def load(self, folder: Path, state: State) -> None:
        """Restore the buffer as it was when `save` returned `state`. The next sample is the same.

        Raises DamagedEpisodeError if a file is missing or damaged, and CheckpointError if the settings differ (`beta`,
        storage and device may differ, and the capacity may be larger). The buffer is then empty.
        """
        self._clear()
        self._growing = [None] * len(self._growing)
        own, before = self._settings(), dict(state.get("settings", {}))
        larger = {"capacity": max(self.capacity, before.get("capacity", 0))}
        if state.get("format") != _FORMAT or before | larger != own:
            raise CheckpointError(
                f"{folder}: the recorded replay has format {state.get('format')} and was made with "
                f"{state.get('settings')}; this one has format {_FORMAT} and was made with {self._settings()}. "
                "Fix: use the same settings, or start a new run"
            )
        try:
            for start, length, name in state["episodes"]:
                episode = read_episode(folder / name, length, self._frames, self.action_dim + 2)
                self._write(_StoredEpisode(start, length, name), episode)
        except CheckpointError as error:
            self._clear()
            raise DamagedEpisodeError(str(error)) from error
        leaves = np.zeros(self._size)
        leaves[self._live_slots()] = state["priorities"].numpy()
        self._tree.fill(leaves)
        self._growing = [
            growing and EpisodeBuffer(list(growing["frames"].numpy().copy()), list(growing["steps"].numpy().copy()))
            for growing in state["growing"]
        ]

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self._growing):
            raise DataError(
                f"replay: row {row} of {len(self._growing)}. Fix: raise num_rows, or pass a row that exists"
            )
        return row

    def _commit(self, episode: Episode) -> None:
        """Add a finished episode to the buffer. Removes the oldest episodes until it fits."""
        greatest = float(self._tree.leaves.max()) or 1.0
        stored = _StoredEpisode(self._head, len(episode))
        while self._stored and (
            self._count + stored.length > self.capacity or stored.stop - self._stored[0].start > self._size
        ):
            oldest = self._stored.popleft()
            self._count -= oldest.length
            self._tree.set(self._slots(oldest.start, oldest.stop), 0.0)
        self._write(stored, episode)
        # At the end of an episode that terminated, the last steps have values that nothing bootstraps.
        short = self.short or bool(episode.steps[-1, -1] > 0)
        starts = stored.length if short else max(stored.length - self.length + 1, 1)
        self._tree.set(self._slots(stored.start, stored.start + starts), greatest)

    def _write(self, stored: _StoredEpisode, episode: Episode) -> None:
        first = stored.start % self._size
        self._obs.write(first, episode.frames)
        self._steps.write(first, episode.steps)
        slots = self._slots(stored.start, stored.stop)
        self._age[slots] = np.arange(stored.length + 1)
        self._left[slots] = np.arange(stored.length, -1, -1)
        self._stored.append(stored)
        self._count += stored.length
        self._head = stored.stop

    def _episode(self, stored: _StoredEpisode) -> Episode:
        first = stored.start % self._size
        return Episode(self._obs.read(first, stored.length + 1), self._steps.read(first, stored.length))

    def _frame_slots(self, slots: np.ndarray, age: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Return the slots of the frames of segments: T + 1 by B without stacks, otherwise B by T + k contiguous ones."""
        time = np.arange(1 - self._frames.stack, self.length + 1)
        if self._frames.stack == 1:
            return self._wrapped(slots + np.clip(time[:, None], -age, left)).reshape(-1)
        return self._wrapped(slots[:, None] + np.clip(time, -age[:, None], left[:, None])).reshape(-1)

    def _observations(self, frames: Tensor, rows: int) -> Tensor:
        """Return the stacked observations (T+1 B *S) of the frames at `_frame_slots`. Each stack is a view of k frames."""
        stack, width, steps = self._frames.stack, self._frames.width, self.length + 1
        if stack == 1:
            return frames.view(steps, rows, *self._frames.shape)
        strides = (width, (steps + stack - 1) * width, 1)
        return frames.as_strided((steps, rows, stack * width), strides).unflatten(2, self._frames.shape)

    def _slots(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop) % self._size

    def _live_slots(self) -> np.ndarray:
        return self._slots(self._stored[0].start, self._head) if self._stored else np.zeros(0, dtype=np.int64)

    def _wrapped(self, slots: np.ndarray) -> np.ndarray:
        return slots % self._size

    def _settings(self) -> State:
        return {
            "capacity": self.capacity,
            "obs_shape": list(self._frames.shape),
            "obs_dtype": self._frames.dtype.name,
            "action_dim": self.action_dim,
            "length": self.length,
            "stack": self._frames.stack,
            "num_rows": len(self._growing),
            "alpha": self.alpha,
        }


def prune(folder: Path, states: Iterable[State]) -> None:
    """Delete the episode files in `folder` that none of `states` names, including partial files left by a kill."""
    named = {name for state in states for _, _, name in state["episodes"]}
    for path in [*folder.glob("episode-*.npz"), *folder.glob("episode-*.npz.tmp")]:
        if path.name not in named:
            path.unlink(missing_ok=True)
