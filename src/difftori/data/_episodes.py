"""Recorded episodes: grown step by step, and kept in files that are written once."""

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
    """L steps and the L + 1 frames around them, flat: `frames` (L+1 F); `steps` (L A+2): action, reward, terminated."""

    frames: Shaped[np.ndarray, "frames F"]
    steps: Float[np.ndarray, "L columns"]

    def __len__(self) -> int:
        return len(self.steps)


@final
@dataclass
class Growing:
    """An episode that has not ended: its frames and steps so far."""

    frames: list[np.ndarray] = field(default_factory=list)
    steps: list[np.ndarray] = field(default_factory=list)

    def end(self) -> Episode:
        """The whole of it as two arrays."""
        return Episode(np.stack(self.frames), np.stack(self.steps))


@final
@dataclass(frozen=True)
class Frames:
    """How observations of `shape` (k·C …) and `dtype` come apart into `stack` frames (k) of shape (C …)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stack: int

    @property
    def width(self) -> int:
        """The numbers in one frame."""
        return int(np.prod(self.shape)) // self.stack

    def split(self, obs: np.ndarray, place: str) -> Shaped[np.ndarray, "k F"]:
        """The frames of an observation, oldest first, as a copy.

        Raises DataError for another shape or type, and NonFiniteError for NaN or Inf.
        """
        obs = np.asarray(obs)
        if obs.shape != self.shape or not np.can_cast(obs.dtype, self.dtype, "same_kind"):
            raise DataError(
                f"{place}: the observation is {obs.dtype} of shape {obs.shape}; this buffer was made for "
                f"{self.dtype} of shape {self.shape}"
            )
        frames = as_finite(obs, self.dtype, "the observation", place)
        return frames.reshape(self.stack, self.width)


def as_finite(values: object, dtype: np.dtype, what: str, place: str) -> np.ndarray:
    """A copy of `values` as `dtype`. Raises NonFiniteError if NaN or Inf is in it."""
    with np.errstate(over="ignore"):  # what is too large becomes Inf, and is reported as such
        array = np.array(values, dtype=dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        where = f" at {list(index)}" if index else ""
        raise NonFiniteError(f"{place}: {what} holds {array[index]}{where}, as {dtype}; look at what it comes from")
    return array


def write_episode(folder: Path, number: int, episode: Episode) -> str:
    """Write an episode to a file and return its name, which holds the sha256 of the content. Raises OSError.

    It is there whole or not at all. Another content gets another name, so that no file is ever changed.
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
    """Read what `write_episode` wrote, without pickle. Raises CheckpointError naming the file and its fault."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); restore it, or go back to a checkpoint that does not name it"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != path.stem.rpartition("-")[2]:
        raise CheckpointError(
            f"{path}: damaged, its {len(content)} bytes have the sha256 {found[:12]}…, not the one in its name; "
            "restore it, or go back to a checkpoint that does not name it"
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
            f"{path}: not an episode of plain arrays ({error}); pickled objects are refused"
        ) from error
    expected = ((length + 1, frames.width), frames.dtype, (length, columns), np.dtype(np.float32))
    if (episode.frames.shape, episode.frames.dtype, episode.steps.shape, episode.steps.dtype) != expected:
        raise CheckpointError(
            f"{path}: holds {episode.frames.dtype} frames {episode.frames.shape} and {episode.steps.dtype} steps "
            f"{episode.steps.shape}; expected {expected[1]} {expected[0]} and {expected[3]} {expected[2]}"
        )
    return episode
