"""Copies the rows of a data set into tensors: dtypes, memory and checks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from difftori.data._columns import Storage, make_rows
from difftori.data._forms import Form, choose_form
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
    """Allocates and fills tensors of `ends[-1]` steps. `ends` (E) are the ends of the episodes that are stored.

    `spans` (E 2) are the first step and the end of each in the data set: all steps outside of them are skipped. `numbers` (E)
    are the numbers of the episodes in the data set.
    """

    ends: Int[np.ndarray, "E"]
    spans: Int[np.ndarray, "E 2"]
    numbers: Int[np.ndarray, "E"]
    whole: bool
    storage: Storage = "memory"
    folder: Path | None = None
    device: torch.device = torch.device("cpu")

    @staticmethod
    def of(
        ends: Int[np.ndarray, "E"],
        episodes: Sequence[int] | None = None,
        storage: Storage = "memory",
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> "TensorWriter":
        """Create a writer for these episodes, in increasing order, of a data set with these `ends`. Default: all episodes."""
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)
        numbers = np.arange(len(ends)) if episodes is None else np.asarray(episodes, dtype=np.int64)
        spans = spans[numbers]
        kept = np.cumsum(spans[:, 1] - spans[:, 0])
        return TensorWriter(kept, spans, numbers, episodes is None, storage, folder, torch.device(device))

    @property
    def steps(self) -> int:
        """Number of steps of all episodes together."""
        return int(self.ends[-1])

    def fill(self, parts: Sequence[Field]) -> Tensor:
        """Return the steps of one key (T …), or several vectors concatenated (T ΣS), as float32 or uint8.

        Images become uint8 (T height width C), see `choose_form`. Everything else becomes float32.
        Raises DataError for NaN, Inf, a number of steps other than T, vectors that cannot be concatenated, or no memory.
        """
        shape = parts[0].shape or (1,)
        if len(parts) > 1:
            shape = (sum(_vector_width(part) for part in parts),)
        if 0 in shape:
            raise DataError(f"{parts[0].place}: a step has the shape {shape}, so it is empty. Fix: omit this key")
        blocks = [self._kept(part.blocks) for part in parts]
        form = Form(shape)
        if len(parts) == 1:
            first, form = choose_form(blocks[0], shape)
            blocks = [chain(first, blocks[0])]
        rows = make_rows(
            self.steps,
            math.prod(shape),
            form.dtype,
            storage=self.storage,
            folder=self.folder,
            device=self.device,
            owner=parts[0].place,
            less="read fewer entries",
        )
        offset = 0
        for part, own in zip(parts, blocks, strict=True):
            self._copy(part, own, rows[:, offset : offset + part.width], form)
            offset += part.width
        return rows.view(self.steps, *form.shape)

    def _kept(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Return the steps of the chosen episodes only. Reads no further than to the last of them."""
        if self.whole:
            yield from blocks
            return
        keep = np.zeros(self.spans[-1, 1], dtype=bool)
        for start, stop in self.spans:
            keep[start:stop] = True
        done = 0
        for block in blocks:
            mask = keep[done : done + len(block)]
            if mask.any():
                yield block[: len(mask)][mask]
            done += len(block)
            if done >= len(keep):
                return

    def _copy(self, part: Field, blocks: Iterator[np.ndarray], rows: Tensor, form: Form) -> None:
        place, done = part.place, 0
        for block in blocks:
            if block.shape[1:] != part.shape:
                raise DataError(
                    f"{place}: steps have the shape {block.shape[1:]} from {self.locate(done)} on; expected {part.shape}. "
                    "Fix: exclude that episode, or create the data set again"
                )
            if 0 < len(block) <= self.steps - done:
                values = self._checked(place, form.arranged(block).reshape(len(block), -1), done, form)
                rows[done : done + len(block)] = torch.from_numpy(values).to(rows.device)
            done += len(block)
        if done != self.steps:
            raise DataError(
                f"{place}: holds {done} steps, but the episodes have {self.steps}; it is truncated, or belongs to another "
                "data set. Fix: create the data set again"
            )

    def _checked(self, place: str, block: np.ndarray, first: int, form: Form) -> np.ndarray:
        """Return the block as the form's dtype. Raises DataError for values that do not fit."""
        if block.dtype.kind not in "fiub":
            raise DataError(
                f"{place}: has the dtype {block.dtype}, which is not numeric. Fix: omit this key or create the data set again"
            )
        if form.dtype == torch.uint8:
            bad, words = form.misfits(block), form.rule
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
        return form.converted(block)

    def locate(self, step: int) -> str:
        """Describe a step by its episode and its number in the episode, for error messages."""
        episode = int(np.searchsorted(self.ends, step, side="right"))
        inside = step - (int(self.ends[episode - 1]) if episode else 0)
        if episode == len(self.ends):  # behind the last episode
            return f"step {step} (episode {episode}, its step {inside})"
        return f"step {self.spans[episode, 0] + inside} (episode {self.numbers[episode]}, its step {inside})"


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
