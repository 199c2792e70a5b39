"""How the rows of a data set come into tensors: their type, their room, and what is wrong with them if anything is."""

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
class Part:
    """One key of a data set: how messages call it, the shape of a step, and its rows, block after block."""

    place: str
    shape: tuple[int, ...]
    blocks: Iterator[np.ndarray]

    @property
    def width(self) -> int:
        """The numbers in one step."""
        return math.prod(self.shape)


@final
@dataclass(frozen=True)
class Room:
    """Where entries of `ends[-1]` steps are put; `ends` (E) says where the episodes end, for messages."""

    ends: Int[np.ndarray, "E"]
    storage: Storage = "memory"
    folder: Path | None = None
    device: torch.device = torch.device("cpu")

    @property
    def steps(self) -> int:
        """All steps of all episodes."""
        return int(self.ends[-1])

    def fill(self, parts: Sequence[Part]) -> Tensor:
        """The steps of one key (T …), or of several vectors side by side (T ΣS), as float32 or uint8.

        uint8 stays where a step has two dimensions or more. Colour images kept as floats, (height width 3) in whole
        numbers from 0 to 255, become uint8 without loss. Everything else becomes float32.
        Raises DataError: NaN, Inf, a number of steps other than T, vectors that cannot be joined, no room.
        """
        shape = parts[0].shape or (1,)
        if len(parts) > 1:
            shape = (sum(_vector_width(part) for part in parts),)
        if 0 in shape:
            raise DataError(f"{parts[0].place}: a step has the shape {shape} and so holds nothing; leave this key out")
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
                    f"{place}: steps have the shape {block.shape[1:]} from {self.locate(done)} on, and {shape} was "
                    "expected; leave that episode out, or make the data anew"
                )
            if 0 < len(block) <= self.steps - done:
                values = self._checked(place, block.reshape(len(block), -1), done, rows.dtype)
                rows[done : done + len(block)] = torch.from_numpy(values).to(rows.device)
            done += len(block)
        if done != self.steps:
            raise DataError(
                f"{place}: holds {done} steps, and the episodes have {self.steps}; it is truncated, or belongs to other "
                "data: make it anew"
            )

    def _checked(self, place: str, block: np.ndarray, first: int, dtype: torch.dtype) -> np.ndarray:
        """The block as `dtype`."""
        if block.dtype.kind not in "fiub":
            raise DataError(f"{place}: holds {block.dtype}, which are no plain numbers; leave it out or make it anew")
        if dtype == torch.uint8:
            bad = np.zeros((), bool) if block.dtype == np.uint8 else ~_whole_bytes(block)
            words = "an image, as its first steps are, holds whole numbers from 0 to 255"
        else:
            with np.errstate(over="ignore"):  # what is too large becomes Inf, and is reported as such
                block = block.astype(np.float32)
            bad = ~np.isfinite(block)
            words = "drop that episode or mend the value"
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"{place}: holds {block[row, column]} at {self.locate(first + row)}, number {column}; {words}"
            )
        return np.ascontiguousarray(block, dtype=np.uint8 if dtype == torch.uint8 else np.float32)

    def locate(self, step: int) -> str:
        """A step as people look for it."""
        episode = int(np.searchsorted(self.ends, step, side="right"))
        start = int(self.ends[episode - 1]) if episode else 0
        return f"step {step} (episode {episode}, its step {step - start})"


def checked_ends(ends: object, place: str) -> Int[np.ndarray, "E"]:
    """Where each episode ends, as int64. Raises DataError unless they are integers that rise from above zero."""
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
            f"{place}: episode {episode} begins at step {starts[episode]} and ends at {array[episode]}; ends must rise: "
            "write them anew as the running sum of the episodes' lengths"
        )
    return array


def _vector_width(part: Part) -> int:
    if len(part.shape) > 1:
        raise DataError(f"{part.place}: steps of shape {part.shape}; only vectors can be joined into one entry")
    return part.width


def _holds_images(block: np.ndarray, shape: tuple[int, ...]) -> bool:
    if block.dtype == np.uint8:
        return len(shape) > 1
    return block.dtype.kind == "f" and len(shape) == 3 and shape[-1] == 3 and bool(_whole_bytes(block).all())


def _whole_bytes(block: np.ndarray) -> np.ndarray:
    """Where a whole number from 0 to 255 stands."""
    return (block >= 0) & (block <= 255) & (block == np.rint(block))
