"""Reads robomimic's HDF5 files: `data/demo_k/actions`, `data/demo_k/obs/*`, and lists of demonstrations in `mask/*`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from difftori.data._filling import Field
from difftori.data.formats._hdf5 import (
    array_in,
    array_keys,
    check_contents,
    group_in,
    member,
    names_in,
    open_file,
    reading,
)
from difftori.data.formats._source import Source, need, plain_names
from difftori.errors import DataError


@final
@dataclass(frozen=True)
class RobomimicSource(Source):
    """A robomimic file. Keys are the paths of a demonstration's arrays, such as `obs/…`; `demos` are groups in the order of `ends`."""

    demos: tuple[Any, ...]

    def field(self, key: str) -> Field:
        """Return the rows of a key, one block per demonstration."""
        shape = array_in(self.demos[0], key, self.path).shape[1:]
        return Field(f"{self.path}: {key}", tuple(shape), self._blocks(key))

    def _blocks(self, key: str) -> Iterator[np.ndarray]:
        starts = np.concatenate([[0], self.ends[:-1]])
        for demo, length in zip(self.demos, self.ends - starts, strict=True):
            dataset = array_in(demo, key, self.path)
            place = f"{self.path}: {demo.name}/{key}"
            if dataset.shape[0] != length:
                raise DataError(
                    f"{place} has {dataset.shape[0]} steps, but its actions {length}. Fix: exclude this demonstration by a "
                    "list in mask/, passed as `subset`, or create it again"
                )
            with reading(place):
                block = dataset[()]
            yield block

    def check_copy(self) -> None:
        """Check that a copy of the file would be complete and could get observations. Raises DataError.

        Links, arrays that are stored in other files, and an `obs` that is no group are refused.
        """
        check_contents(self.demos[0].file, self.path)
        for demo in self.demos:
            if "obs" in demo:
                group_in(demo, "obs", self.path)


@contextmanager
def open_robomimic(path: Path, subset: str | None) -> Iterator[RobomimicSource]:
    """Open the file and check its demonstrations, all or those in `mask/{subset}`, in the order of their numbers.

    Only the content of the file itself is read: links, and arrays stored in other files, are refused.
    Raises DataError if it is not a robomimic file, and MissingExtraError without the extra `data`.
    """
    with open_file(path) as file:
        data = group_in(file, "data", path)
        names = _listed(file, subset, path) if subset is not None else names_in(data, path)
        numbers = {name: _number(name, path) for name in names}
        demos = tuple(group_in(data, name, path) for name in sorted(numbers, key=numbers.__getitem__))
        if not demos:
            raise DataError(
                f"{path}: contains or lists no demonstrations, named data/demo_0 and so on. Fix: restore the file, or choose another list"
            )
        ends = np.cumsum([_length(demo, path) for demo in demos])
        with reading(f"{path}: the attributes of data"):
            about = {name: value for name, value in data.attrs.items() if isinstance(value, str)}
        keys = array_keys(demos[0], path)
        entries = plain_names({key: key.removeprefix("obs/") for key in keys if key.startswith("obs/")}, path)
        yield RobomimicSource(path, keys, "actions", entries, ends, about, demos)


def _length(demo: Any, path: Path) -> int:
    """Return the number of steps of a demonstration. Raises DataError if it is 0, or differs from `num_samples`."""
    steps = int(array_in(demo, "actions", path).shape[0])
    with reading(f"{path}: {demo.name}, num_samples"):
        recorded = int(demo.attrs.get("num_samples", steps))
    if steps == 0 or steps != recorded:
        raise DataError(
            f"{path}: {demo.name}/actions has {steps} steps, but num_samples is {recorded}. Fix: exclude this demonstration by a "
            "list in mask/, passed as `subset`, or create it again"
        )
    return steps


def _listed(file: Any, subset: str, path: Path) -> list[str]:
    """Return the names in `mask/{subset}`."""
    h5py = need("h5py")
    masks = group_in(file, "mask", path)
    lists = names_in(masks, path)
    if subset not in lists:
        raise DataError(f"{path}: no list mask/{subset}. Fix: choose from {', '.join(lists) or 'none'}")
    node = member(masks, subset, path)
    if not isinstance(node, h5py.Dataset) or node.ndim != 1 or h5py.check_string_dtype(node.dtype) is None:
        raise DataError(f"{path}: mask/{subset} is not a list of names. Fix: write it as an array of byte strings")
    with reading(f"{path}: mask/{subset}"):
        return [bytes(name).decode() for name in node[()]]


def _number(name: str, path: Path) -> int:
    match = re.fullmatch(r"demo_(\d+)", name)
    if match is None:
        raise DataError(
            f"{path}: data/{name} is not a demonstration. Fix: rename it; demonstrations are named demo_0, demo_1 and so on"
        )
    return int(match[1])
