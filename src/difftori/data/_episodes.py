"""Recorded episodes: built step by step, and stored in files that are written once."""

import hashlib
import io
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float, Shaped

from difftori.errors import CheckpointError, DataError, NonFiniteError


@final
@dataclass(frozen=True)
class Episode:
    """An episode of L steps as flat arrays: `frames` (L+1 F); `steps` (L A+2), each action, reward, terminated."""

    frames: Shaped[np.ndarray, "frames F"]
    steps: Float[np.ndarray, "L columns"]

    def __len__(self) -> int:
        return len(self.steps)


@final
@dataclass
class EpisodeBuffer:
    """An unfinished episode: its frames and steps so far."""

    frames: list[np.ndarray] = field(default_factory=list)
    steps: list[np.ndarray] = field(default_factory=list)

    def end(self) -> Episode:
        """Return the finished episode as two arrays."""
        return Episode(np.stack(self.frames), np.stack(self.steps))


@final
@dataclass(frozen=True)
class Frames:
    """Splits observations of `shape` (k·C …) and `dtype` into `stack` (k) frames of shape (C …)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stack: int

    @property
    def width(self) -> int:
        """Number of values in one frame."""
        return int(np.prod(self.shape)) // self.stack

    def split(self, obs: np.ndarray, place: str) -> Shaped[np.ndarray, "k F"]:
        """Return a copy of the frames of an observation, oldest first.

        Raises DataError for a different shape or dtype, and NonFiniteError for NaN or Inf.
        """
        obs = np.asarray(obs)
        if obs.shape != self.shape or not np.can_cast(obs.dtype, self.dtype, "same_kind"):
            raise DataError(
                f"{place}: the observation is {obs.dtype} of shape {obs.shape}; this buffer was made for "
                f"{self.dtype} of shape {self.shape}. Fix: pass observations of that type, or create a buffer for these"
            )
        frames = as_finite(obs, self.dtype, "the observation", place)
        return frames.reshape(self.stack, self.width)


def as_finite(values: object, dtype: np.dtype, what: str, place: str) -> np.ndarray:
    """Return a copy of `values` as `dtype`. Raises NonFiniteError if it contains NaN or Inf."""
    with np.errstate(over="ignore"):  # values that are too large become Inf, and are reported as such
        array = np.array(values, dtype=dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        where = f" at {list(index)}" if index else ""
        raise NonFiniteError(
            f"{place}: {what} contains {array[index]}{where}, as {dtype}. Fix: check the code that produces it"
        )
    return array


def write_episode(folder: Path, number: int, episode: Episode) -> str:
    """Write an episode to a file and return the file's name, which contains the sha256 of the content. Raises OSError.

    The file is written atomically. Different content gets a different name, so no file is ever changed.
    """
    buffer = io.BytesIO()
    np.savez(buffer, frames=episode.frames, steps=episode.steps)
    content = buffer.getbuffer()
    name = f"episode-{number:012d}-{hashlib.sha256(content).hexdigest()}.npz"
    partial = folder / f"{name}.tmp"
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / name)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return name


def read_episode(path: Path, length: int, frames: Frames, columns: int) -> Episode:
    """Read a file of `write_episode`, without pickle. Raises CheckpointError with the file and what is wrong with it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Fix: restore the file, or use a checkpoint that does not name it"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != path.stem.rpartition("-")[2]:
        raise CheckpointError(
            f"{path}: damaged, its {len(content)} bytes have the sha256 {found[:12]}…, not the one in its name. "
            "Fix: restore the file, or use a checkpoint that does not name it"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            episode = Episode(archive["frames"], archive["steps"])
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        raise CheckpointError(
            f"{path}: not an episode of plain arrays ({error}); pickled objects are refused. Fix: restore the file"
        ) from error
    expected = ((length + 1, frames.width), frames.dtype, (length, columns), np.dtype(np.float32))
    if (episode.frames.shape, episode.frames.dtype, episode.steps.shape, episode.steps.dtype) != expected:
        raise CheckpointError(
            f"{path}: contains {episode.frames.dtype} frames {episode.frames.shape} and {episode.steps.dtype} steps "
            f"{episode.steps.shape}; expected {expected[1]} {expected[0]} and {expected[3]} {expected[2]}. Fix: restore the file"
        )
    return episode
