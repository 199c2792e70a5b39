"""Prioritised replay: recorded episodes, of which slices of T steps are drawn by priority."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from difftori.data._columns import Column, Storage, make_rows
from difftori.data._episodes import Episode, Frames, Growing, as_finite, read_episode, write_episode
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
class _Kept:
    """A committed episode: the position of its first frame, its steps L, and its file once it has one."""

    start: int
    length: int
    name: str | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length + 1


@final
class Replay:
    """A ring of whole episodes, and slices of T steps drawn from them in proportion to priority^α.

    P(i) = p_i^α / Σ_j p_j^α; weights (N·P(i))^−β over their maximum in the batch, of N slices; drawn independently,
    with replacement (Schaul et al. 2016, Eq. 1, §3.4). As in TD-MPC (Hansen et al. 2022), the slices of a new episode
    get the greatest priority there is, 1 at first, and a slice starts only where its T steps fit. Differs from paper:
    an episode of fewer than T steps can be drawn too, as one slice, padded and masked; TD-MPC's are all of one length.

    `capacity` counts steps. When it is reached the oldest episodes go, whole. There is room for 5 % more observations
    than steps, because an episode has one more: if episodes are shorter than 20 steps on average, fewer are held.

    `obs_shape` is the observation's as the environment gives it, `stack` frames along its first dimension, oldest
    first; only the newest frame is stored, once. `obs_dtype` is uint8 or float32. The stacks are made on `device`.
    `length` is T; `num_rows` counts the environment rows that record at once. `storage` says where observations and
    steps lie: "memory", "device" (on `device`), or "mmap", a nameless file in `folder` (Linux).

    Raises ConfigError listing every faulty setting, and DataError if there is no room for so many steps.
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
        storage: Storage = "memory",
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
                f"replay: storage is {storage!r} and folder {folder}; give a folder for 'mmap', and only then"
            )
        if faults:
            raise ConfigError(faults)

        self.capacity, self.length, self.action_dim = capacity, length, action_dim
        self.alpha, self.beta = alpha, beta
        self.device = torch.device(device)
        self._frames = Frames(tuple(obs_shape), dtype, stack)
        self._size = capacity + max(capacity // 20, 1)
        place = {"storage": storage, "folder": folder, "device": self.device}
        rows = make_rows(self._size, self._frames.width, _OBS_TYPES[dtype.name], **place)
        self._obs = Column(rows, self.device)
        self._steps = Column(make_rows(self._size, action_dim + 2, torch.float32, **place), self.device)
        self._age = np.zeros(self._size, dtype=np.int32)  # steps since the episode began, of each slot
        self._left = np.zeros(self._size, dtype=np.int32)  # steps until it ended
        self._growing: list[Growing | None] = [None] * num_rows
        self._clear()

    def _clear(self) -> None:
        self._tree = SumTree(self._size)
        self._kept: deque[_Kept] = deque()
        self._head = 0  # positions count all frames ever written; a position's slot is its remainder by the size
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def begin(self, row: int, obs: np.ndarray) -> None:
        """The first observation of an episode of environment row `row`: the whole stack, one frame repeated.

        Raises DataError (the row has an unfinished episode; another shape or type; frames that differ) and
        NonFiniteError.
        """
        growing = self._growing[self._checked(row)]
        if growing is not None:
            raise DataError(
                f"replay, row {row}: an episode of {len(growing.steps)} steps has not ended; end it, or drop({row})"
            )
        frames = self._frames.split(obs, f"replay, row {row}, first observation")
        if (frames != frames[-1]).any():
            raise DataError(f"replay, row {row}: the frames of the first observation differ; repeat the first frame")
        self._growing[row] = Growing([frames[-1].copy()])

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
        """One step of environment row `row`. When it ends the episode, the episode can be drawn from then on.

        `action` (A); `next_obs` is what the step led to, also at the end: not the first one of the next episode.
        `terminated` wins over `truncated`.

        Raises NonFiniteError, and DataError: no episode was begun, it is longer than the capacity, a wrong shape or
        type, or frames that do not follow those before. The episode is then as it was before the call.
        """
        growing = self._growing[self._checked(row)]
        if growing is None:
            raise DataError(f"replay, row {row}: a step before the first observation; call begin({row}, obs) first")
        place = f"replay, row {row}, step {len(growing.steps)}"
        if len(growing.steps) == self.capacity:
            raise DataError(f"{place}: the episode is longer than the capacity of {self.capacity} steps; raise it")
        if np.shape(action) != (self.action_dim,):
            raise DataError(f"{place}: the action has shape {np.shape(action)}; it must be ({self.action_dim},)")
        action = as_finite(action, _FLOAT, "the action", place)
        reward = as_finite(reward, _FLOAT, "the reward", place).item()
        frames = self._frames.split(next_obs, place)
        past = growing.frames[-len(frames) :]
        past = [past[0]] * (len(frames) - len(past)) + past
        if any((frame != before).any() for frame, before in zip(frames[:-1], past[1:], strict=True)):
            raise DataError(
                f"{place}: the older frames of the next observation are not those seen before; give what the step led "
                "to, not the first observation of the next episode"
            )
        growing.steps.append(np.array([*action, reward, terminated], dtype=_FLOAT))
        growing.frames.append(frames[-1].copy())
        if terminated or truncated:
            self._growing[row] = None
            self._commit(growing.end())

    def drop(self, row: int) -> None:
        """Forget the unfinished episode of environment row `row`, if there is one."""
        self._growing[self._checked(row)] = None

    def sample(self, batch_size: int, *, generator: torch.Generator) -> Segment:
        """Draw `batch_size` slices, on `device`; what they hold stays as it is for as long as they are used.

        `generator` lives on the CPU, and its state is a tensor: with it and the buffer restored, the draw is the same.
        Raises DataError if there is no whole episode yet.
        """
        if self._count == 0 or batch_size < 1 or generator.device.type != "cpu":
            raise DataError(
                f"replay: asked for {batch_size} slices of {self._count} recorded steps with a generator on "
                f"{generator.device}; ask for at least 1, after at least one whole episode, with one on the CPU"
            )
        mass = torch.rand(batch_size, dtype=torch.float64, generator=generator).numpy() * self._tree.total
        slots = self._tree.find(mass)
        leaves = self._tree.leaves[slots]
        weights = (leaves / leaves.min()) ** -self.beta
        age, left = self._age[slots], self._left[slots]
        time = np.arange(self.length)[:, None]
        mask = time < left
        steps = self._steps.gather(self._wrapped(slots + np.minimum(time, left - 1)).reshape(-1))
        present = self._tensor(mask.astype(_FLOAT))
        steps = steps.view(self.length, batch_size, -1) * present[..., None]
        tail = self._kept[0].start
        return Segment(
            obs=self._observations(slots, age, left),
            actions=steps[..., :-2].contiguous(),
            rewards=steps[..., -2].contiguous(),
            terminated=steps[..., -1] > 0,
            mask=present,
            weights=self._tensor(weights.astype(_FLOAT)),
            index=self._tensor(tail + (slots - tail) % self._size),
        )

    def update_priorities(self, index: RowCounts, priorities: Rows) -> None:
        """Set the priorities (B), at least 0, of the slices that start at `index` (B), as a Segment names them.

        10⁻⁶ is added, so that every slice can still be drawn. Slices of episodes that are gone are passed over.
        Raises NonFiniteError for NaN or Inf, DataError for a priority below 0 or where no slice starts.
        """
        positions = index.detach().cpu().numpy()
        values = priorities.detach().cpu().double().numpy()
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise NonFiniteError(
                f"replay: {len(bad)} of {len(values)} priorities are NaN or Inf, first {values[bad[0]]} of row {bad[0]}"
                "; look at the losses of that row"
            )
        alive = positions >= (self._kept[0].start if self._kept else self._head)
        slots = self._wrapped(positions[alive])
        faulty = (values[alive] < 0) | (positions[alive] >= self._head) | (self._tree.leaves[slots] == 0)
        if faulty.any():
            first = int(np.flatnonzero(alive)[faulty.argmax()])
            raise DataError(
                f"replay: row {first} sets the priority of the slice at {positions[first]} to {values[first]}; no "
                "slice starts there, or it is below 0: give a Segment's index, and priorities from 0"
            )
        self._tree.set(slots, (values[alive] + _EPS) ** self.alpha)

    def save(self, folder: Path) -> State:
        """Write the episodes that `folder` does not have yet, one file each, and return the state for a checkpoint.

        No file is ever changed, so that earlier states keep theirs. The state names the files with their sha256 and
        holds priorities, positions and unfinished episodes. Raises CheckpointError if a file cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for kept in self._kept:
                if kept.name is None or not (folder / kept.name).exists():
                    kept.name = write_episode(folder, kept.start, self._episode(kept))
        except OSError as error:
            raise CheckpointError(
                f"{folder}: an episode cannot be written ({error}); what earlier checkpoints name is intact. "
                "Free space on that disk, or give another directory"
            ) from error
        live = self._live_slots()
        return {
            "format": _FORMAT,
            "settings": self._settings(),
            "episodes": [[kept.start, kept.length, kept.name] for kept in self._kept],
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
        """Make this buffer what it was when `save` returned `state`: the next draw is the same.

        Raises DamagedEpisodeError if a file is missing or damaged, CheckpointError if the buffer was made otherwise (`beta`, storage and
        device may differ); this buffer is then empty.
        """
        self._clear()
        self._growing = [None] * len(self._growing)
        if state.get("format") != _FORMAT or state.get("settings") != self._settings():
            raise CheckpointError(
                f"{folder}: the recorded replay is of format {state.get('format')} and made with "
                f"{state.get('settings')}; this one is of format {_FORMAT} and made with {self._settings()}"
            )
        try:
            for start, length, name in state["episodes"]:
                episode = read_episode(folder / name, length, self._frames, self.action_dim + 2)
                self._write(_Kept(start, length, name), episode)
        except CheckpointError as error:
            self._clear()
            raise DamagedEpisodeError(str(error)) from error
        leaves = np.zeros(self._size)
        leaves[self._live_slots()] = state["priorities"].numpy()
        self._tree.fill(leaves)
        self._growing = [
            growing and Growing(list(growing["frames"].numpy().copy()), list(growing["steps"].numpy().copy()))
            for growing in state["growing"]
        ]

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self._growing):
            raise DataError(f"replay: row {row} of {len(self._growing)}; raise num_rows, or mend the row")
        return row

    def _commit(self, episode: Episode) -> None:
        """Make an episode one that can be drawn; the oldest go until there is room."""
        greatest = float(self._tree.leaves.max()) or 1.0
        kept = _Kept(self._head, len(episode))
        while self._kept and (
            self._count + kept.length > self.capacity or kept.stop - self._kept[0].start > self._size
        ):
            oldest = self._kept.popleft()
            self._count -= oldest.length
            self._tree.set(self._slots(oldest.start, oldest.stop), 0.0)
        self._write(kept, episode)
        starts = max(kept.length - self.length + 1, 1)
        self._tree.set(self._slots(kept.start, kept.start + starts), greatest)

    def _write(self, kept: _Kept, episode: Episode) -> None:
        first = kept.start % self._size
        self._obs.write(first, episode.frames)
        self._steps.write(first, episode.steps)
        slots = self._slots(kept.start, kept.stop)
        self._age[slots] = np.arange(kept.length + 1)
        self._left[slots] = np.arange(kept.length, -1, -1)
        self._kept.append(kept)
        self._count += kept.length
        self._head = kept.stop

    def _episode(self, kept: _Kept) -> Episode:
        first = kept.start % self._size
        return Episode(self._obs.read(first, kept.length + 1), self._steps.read(first, kept.length))

    def _observations(self, slots: np.ndarray, age: np.ndarray, left: np.ndarray) -> Tensor:
        """The stacked observations (T+1 B *S). With T + k frames of a row side by side, each stack is a view of k."""
        rows, stack, width = len(slots), self._frames.stack, self._frames.width
        steps = self.length + 1
        time = np.arange(1 - stack, steps)
        if stack == 1:
            chosen = slots + np.clip(time[:, None], -age, left)
            return self._obs.gather(self._wrapped(chosen).reshape(-1)).view(steps, rows, *self._frames.shape)
        chosen = slots[:, None] + np.clip(time, -age[:, None], left[:, None])
        frames = self._obs.gather(self._wrapped(chosen).reshape(-1))
        stacks = frames.as_strided((steps, rows, stack * width), (width, len(time) * width, 1))
        return stacks.unflatten(2, self._frames.shape)

    def _slots(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop) % self._size

    def _live_slots(self) -> np.ndarray:
        return self._slots(self._kept[0].start, self._head) if self._kept else np.zeros(0, dtype=np.int64)

    def _wrapped(self, slots: np.ndarray) -> np.ndarray:
        return slots % self._size

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

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
    """Delete the episode files in `folder`, and what a kill left half-written, that none of `states` names."""
    named = {name for state in states for _, _, name in state["episodes"]}
    for path in [*folder.glob("episode-*.npz"), *folder.glob("episode-*.npz.tmp")]:
        if path.name not in named:
            path.unlink(missing_ok=True)
