"""Copies the rows of a data set into tensors: dtypes, memory and checks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from difftori.data._columns import Storage, make_rows
from difftori.errors import DataError


@final
@dataclass(frozen=True)
class Field:
    """One key of a data set: its name in error messages (`place`), the shape of a step, and its rows, block by block."""

    place: str
    shape: tuple[int, ...]
    blocks: Iterator[np.ndarray]

    @property
    def width(self) -> int:
        """Number of values in one step."""
        return math.prod(self.shape)


@final
@dataclass(frozen=True)
class TensorWriter:
    """Allocates and fills tensors of `ends[-1]` steps. `ends` (E) are the ends of the episodes, for error messages."""

    ends: Int[np.ndarray, "E"]
    storage: Storage = "memory"
    folder: Path | None = None
    device: torch.device = torch.device("cpu")

    @property
    def steps(self) -> int:
        """Number of steps of all episodes together."""
        return int(self.ends[-1])

    def fill(self, parts: Sequence[Field]) -> Tensor:
        """Return the steps of one key (T …), or several vectors concatenated (T ΣS), as float32 or uint8.

        uint8 is preserved if a step has two dimensions or more. Colour images stored as floats, (height width 3) with
        integers from 0 to 255, become uint8 without loss. Everything else becomes float32.
        Raises DataError for NaN, Inf, a number of steps other than T, vectors that cannot be concatenated, or no memory.
        """
        shape = parts[0].shape or (1,)
        if len(parts) > 1:
            shape = (sum(_vector_width(part) for part in parts),)
        if 0 in shape:
            raise DataError(f"{parts[0].place}: a step has the shape {shape}, so it is empty. Fix: omit this key")
        first = list(islice(parts[0].blocks, 1))
        is_image = len(parts) == 1 and len(first) > 0 and _holds_images(first[0], shape)
        dtype = torch.uint8 if is_image else torch.float32
        rows = make_rows(
            self.steps,
            math.prod(shape),
            dtype,
            storage=self.storage,
            folder=self.folder,
            device=self.device,
            owner=parts[0].place,
            less="read fewer entries",
        )
        offset = 0
        for number, part in enumerate(parts):
            blocks = chain(first, part.blocks) if number == 0 else part.blocks
            self._copy(part.place, part.shape, blocks, rows[:, offset : offset + part.width])
            offset += part.width
        return rows.view(self.steps, *shape)

    def _copy(self, place: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray], rows: Tensor) -> None:
        done = 0
        for block in blocks:
            if block.shape[1:] != shape:
                raise DataError(
                    f"{place}: steps have the shape {block.shape[1:]} from {self.locate(done)} on; expected {shape}. "
                    "Fix: exclude that episode, or create the data set again"
                )
            if 0 < len(block) <= self.steps - done:
                values = self._checked(place, block.reshape(len(block), -1), done, rows.dtype)
                rows[done : done + len(block)] = torch.from_numpy(values).to(rows.device)
            done += len(block)
        if done != self.steps:
            raise DataError(
                f"{place}: holds {done} steps, but the episodes have {self.steps}; it is truncated, or belongs to another "
                "data set. Fix: create the data set again"
            )

    def _checked(self, place: str, block: np.ndarray, first: int, dtype: torch.dtype) -> np.ndarray:
        """Return the block as `dtype`. Raises DataError for values that do not fit."""
        if block.dtype.kind not in "fiub":
            raise DataError(
                f"{place}: has the dtype {block.dtype}, which is not numeric. Fix: omit this key or create the data set again"
            )
        if dtype == torch.uint8:
            bad = np.zeros((), bool) if block.dtype == np.uint8 else ~_whole_bytes(block)
            words = (
                "the first steps are images, so all values must be whole numbers from 0 to 255. Fix: correct the value"
            )
        else:
            with np.errstate(over="ignore"):  # values that are too large become Inf, and are reported as such
                block = block.astype(np.float32)
            bad = ~np.isfinite(block)
            words = "values must be finite. Fix: drop that episode or correct the value"
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"{place}: holds {block[row, column]} at {self.locate(first + row)}, number {column}; {words}"
            )
        return np.ascontiguousarray(block, dtype=np.uint8 if dtype == torch.uint8 else np.float32)

    def locate(self, step: int) -> str:
        """Describe a step by its episode and its number in the episode, for error messages."""
        episode = int(np.searchsorted(self.ends, step, side="right"))
        start = int(self.ends[episode - 1]) if episode else 0
        return f"step {step} (episode {episode}, its step {step - start})"


def checked_ends(ends: object, place: str) -> Int[np.ndarray, "E"]:
    """Return the end of each episode as int64. Raises DataError unless the ends are positive, increasing integers."""
    array = np.asarray(ends)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise DataError(
            f"{place}: episode ends are {array.dtype} of shape {array.shape}; they must be integers (E), "
            "one per episode, and at least one"
        )
    array = array.astype(np.int64)
    starts = np.concatenate([[0], array[:-1]])
    wrong = np.flatnonzero(array <= starts)
    if len(wrong):
        episode = int(wrong[0])
        raise DataError(
            f"{place}: episode {episode} begins at step {starts[episode]} and ends at {array[episode]}; ends must increase. "
            "Fix: write them as the cumulative sum of the episodes' lengths"
        )
    return array


def _vector_width(part: Field) -> int:
    if len(part.shape) > 1:
        raise DataError(f"{part.place}: steps of shape {part.shape}; only vectors can be concatenated into one entry")
    return part.width


def _holds_images(block: np.ndarray, shape: tuple[int, ...]) -> bool:
    if block.dtype == np.uint8:
        return len(shape) > 1
    return block.dtype.kind == "f" and len(shape) == 3 and shape[-1] == 3 and bool(_whole_bytes(block).all())


def _whole_bytes(block: np.ndarray) -> np.ndarray:
    """Return a mask of the values that are whole numbers from 0 to 255."""
    return (block >= 0) & (block <= 255) & (block == np.rint(block))
