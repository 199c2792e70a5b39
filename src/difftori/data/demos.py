"""Demonstrations as rows: an observation, and the next H actions of the expert."""

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

    Raises DataError if the shapes do not match, a dtype is not floating-point (`obs` may be integers, such as images), or
    a row contains NaN or Inf.
    """

    # Plain types: the content of files is always checked here, not only under the tests' shape checker.
    obs: Tensor
    actions: Tensor

    def __post_init__(self):
        if self.obs.ndim < 2 or self.actions.ndim != 3:
            raise DataError(
                f"demonstrations: obs of shape {tuple(self.obs.shape)} and actions of shape "
                f"{tuple(self.actions.shape)}; obs must be (N S) or (N …), and actions (N H A)"
            )
        if len(self.obs) != len(self.actions) or len(self.obs) == 0:
            raise DataError(
                f"demonstrations: {len(self.obs)} rows of obs and {len(self.actions)} of actions; "
                "both must have the same number of rows, at least one"
            )
        if not self.actions.is_floating_point() or self.obs.is_complex() or self.obs.dtype == torch.bool:
            raise DataError(
                f"demonstrations: obs are {self.obs.dtype} and actions {self.actions.dtype}. Fix: convert them to float"
            )
        _check_finite("obs", self.obs)
        _check_finite("actions", self.actions)

    def __len__(self) -> int:
        return len(self.obs)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Window]:
        """Iterate once over the set in random order; the last batch may be smaller.

        `generator` is a CPU generator. The whole order is sampled from it when the first batch is requested.
        """
        if batch_size < 1:
            raise DataError(f"batches: batch_size is {batch_size}; it must be at least 1")
        order = torch.randperm(len(self), generator=generator).to(self.obs.device)
        for rows in order.split(batch_size):
            yield self.batch(rows)

    def in_order(self, batch_size: int = 1024) -> Iterator[Window]:
        """Iterate once over the set in order."""
        for rows in torch.arange(len(self), device=self.obs.device).split(batch_size):
            yield self.batch(rows)

    def batch(self, index: RowCounts) -> Window:
        """Return these rows as windows with one observation, `state`."""
        return Window(state_obs(self.obs[index]), self.actions[index], index)

    def save(self, path: Path) -> None:
        """Write an .npz file atomically and without pickle. Raises DataError if it cannot be written."""
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
            raise DataError(
                f"{path}: cannot be written ({error}). Fix: free space, or choose another location"
            ) from error

    @staticmethod
    def load(path: Path) -> "Demos":
        """Read an .npz file of `obs` and `actions`. Numbers become float32, except images of bytes.

        Raises DataError if it is missing, truncated or corrupt, or contains pickled objects.
        """
        try:
            arrays = _read_arrays(path)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file. Fix: check the path") from error
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise DataError(
                f"{path}: not a readable .npz of plain arrays ({error}); it is truncated or corrupt, or contains pickled "
                "objects, which are refused. Fix: create the file again"
            ) from error
        obs, actions = (torch.from_numpy(arrays[name]) for name in _ARRAYS)
        return Demos(obs if obs.dtype == torch.uint8 else obs.float(), actions.float())


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{path}: a single array; expected an .npz with {' and '.join(_ARRAYS)}")
        missing = [name for name in _ARRAYS if name not in archive.files]
        if missing:
            raise DataError(
                f"{path}: no array named {', '.join(missing)}; it contains {', '.join(archive.files) or 'nothing'}"
            )
        return {name: _numeric(archive[name], name, path) for name in _ARRAYS}


def _numeric(array: object, name: str, path: Path) -> np.ndarray:
    if not isinstance(array, np.ndarray):  # numpy returns the raw bytes of a member that is not an array
        raise DataError(f"{path}: {name} is not an array. Fix: create the file again")
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
            f"demonstrations: {name} contains NaN or Inf in {int(bad.sum())} of {len(values)} rows, first in row {row}. "
            "Fix: drop or correct those rows"
        )
