"""Demonstrations: what was seen, and the H actions that the expert then took."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from difftori.errors import DataError
from difftori.types import RowCounts, Window, state_obs

_ARRAYS = ("obs", "actions")


@dataclass(frozen=True)
class Demos:
    """A set of N demonstrations in the task's own units: `obs` (N S) or (N …), `actions` (N H A).

    Raises DataError if the shapes do not fit together, a type is not floating (integers are allowed for `obs`, as
    images are), or a row holds NaN or Inf.
    """

    # Plain types: what stands in files is checked here, always, and not only under the tests' shape checker.
    obs: Tensor
    actions: Tensor

    def __post_init__(self):
        if self.obs.ndim < 2 or self.actions.ndim != 3:
            raise DataError(
                f"demonstrations: obs of shape {tuple(self.obs.shape)} and actions of shape "
                f"{tuple(self.actions.shape)}; they must be (N S) or (N …), and (N H A)"
            )
        if len(self.obs) != len(self.actions) or len(self.obs) == 0:
            raise DataError(
                f"demonstrations: {len(self.obs)} rows of obs and {len(self.actions)} of actions; "
                "there must be as many of both, and at least one"
            )
        if not self.actions.is_floating_point() or self.obs.is_complex() or self.obs.dtype == torch.bool:
            raise DataError(
                f"demonstrations: obs are {self.obs.dtype} and actions {self.actions.dtype}; make them float"
            )
        _check_finite("obs", self.obs)
        _check_finite("actions", self.actions)

    def __len__(self) -> int:
        return len(self.obs)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Window]:
        """One pass over the set in random order; the last batch may be smaller.

        `generator` lives on the CPU. The whole order is drawn from it when the first batch is asked for.
        """
        if batch_size < 1:
            raise DataError(f"batches: batch_size is {batch_size}; it must be at least 1")
        order = torch.randperm(len(self), generator=generator).to(self.obs.device)
        for rows in order.split(batch_size):
            yield self.batch(rows)

    def in_order(self, batch_size: int = 1024) -> Iterator[Window]:
        """One pass over the set in order."""
        for rows in torch.arange(len(self), device=self.obs.device).split(batch_size):
            yield self.batch(rows)

    def batch(self, index: RowCounts) -> Window:
        """These examples, as windows of one observation `state`."""
        return Window(state_obs(self.obs[index]), self.actions[index], index)

    def save(self, path: Path) -> None:
        """Write an .npz file without pickle; it appears whole or not at all. Raises DataError if it cannot be written."""
        partial = path.with_name(path.name + ".tmp")
        content = io.BytesIO()
        np.savez(content, obs=self.obs.cpu().numpy(), actions=self.actions.cpu().numpy())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DataError(f"{path}: cannot be written ({error}); free space or choose another place") from error

    @staticmethod
    def load(path: Path) -> "Demos":
        """Read what `save` wrote. Raises DataError if the file is missing, truncated, corrupt or holds pickled objects."""
        try:
            arrays = _read_arrays(path)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{path}: there is no such file") from error
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise DataError(
                f"{path}: not a readable .npz of plain arrays ({error}); it is truncated, corrupt, or holds pickled "
                "objects, which are refused: make it anew"
            ) from error
        return Demos(torch.from_numpy(arrays["obs"]), torch.from_numpy(arrays["actions"]))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{path}: a single array, not an .npz of {' and '.join(_ARRAYS)}")
        missing = [name for name in _ARRAYS if name not in archive.files]
        if missing:
            raise DataError(
                f"{path}: no array named {', '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}"
            )
        return {name: _numeric(archive[name], name, path) for name in _ARRAYS}


def _numeric(array: object, name: str, path: Path) -> np.ndarray:
    if not isinstance(array, np.ndarray):  # numpy hands out the raw bytes of what is no array
        raise DataError(f"{path}: {name} is no array; make the file anew")
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8 or not array.dtype.isnative:
        raise DataError(
            f"{path}: {name} is of type {array.dtype}; it must be a native integer or float of at most 64 bits"
        )
    return array


def _check_finite(name: str, values: Tensor) -> None:
    bad = ~values.isfinite().flatten(1).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(
            f"demonstrations: {name} holds NaN or Inf in {int(bad.sum())} of {len(values)} rows, first in row {row}; "
            "drop or mend those rows"
        )
