"""Reads robomimic's HDF5 files: `data/demo_k/actions`, `data/demo_k/obs/*`, and lists of demonstrations in `mask/*`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from difftori.data._filling import Field
from difftori.data.formats._source import Source, need, plain_names
from difftori.errors import DataError

_FAULTS = (OSError, ValueError, RuntimeError, TypeError, KeyError, MemoryError)
# deflate, shuffle, fletcher32, szip, nbit, scale-offset, lzf: others would load a plug-in.
_FILTERS = (1, 2, 3, 4, 5, 6, 32000)

_DEPTH = 16
"""Greatest depth of groups that is searched; hard links can form cycles."""


@final
@dataclass(frozen=True)
class RobomimicSource(Source):
    """A robomimic file. Keys are the paths of a demonstration's arrays, such as `obs/…`; `demos` are groups in the order of `ends`."""

    demos: tuple[Any, ...]

    def field(self, key: str) -> Field:
        """Return the rows of a key, one block per demonstration."""
        shape = _dataset(self.demos[0], key, self.path).shape[1:]
        return Field(f"{self.path}: {key}", tuple(shape), self._blocks(key))

    def _blocks(self, key: str) -> Iterator[np.ndarray]:
        starts = np.concatenate([[0], self.ends[:-1]])
        for demo, length in zip(self.demos, self.ends - starts, strict=True):
            dataset = _dataset(demo, key, self.path)
            place = f"{self.path}: {demo.name}/{key}"
            if dataset.shape[0] != length:
                raise DataError(
                    f"{place} has {dataset.shape[0]} steps, but its actions {length}. Fix: exclude this demonstration by a "
                    "list in mask/, passed as `subset`, or create it again"
                )
            with _reading(place):
                block = dataset[()]
            yield block


@contextmanager
def open_robomimic(path: Path, subset: str | None) -> Iterator[RobomimicSource]:
    """Open the file and check its demonstrations, all or those in `mask/{subset}`, in the order of their numbers.

    Only the content of the file itself is read: links, and arrays stored in other files, are refused.
    Raises DataError if it is not a robomimic file, and MissingExtraError without the extra `data`.
    """
    h5py = need("h5py")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            f"{path}: no readable HDF5 file ({error}); it is truncated or damaged. Fix: restore the file"
        ) from error
    with file:
        data = _group(file, "data", path)
        names = _listed(file, subset, path) if subset is not None else _names(data, path)
        numbers = {name: _number(name, path) for name in names}
        demos = tuple(_group(data, name, path) for name in sorted(numbers, key=numbers.__getitem__))
        if not demos:
            raise DataError(
                f"{path}: contains or lists no demonstrations, named data/demo_0 and so on. Fix: restore the file, or choose another list"
            )
        ends = np.cumsum([_length(demo, path) for demo in demos])
        with _reading(f"{path}: the attributes of data"):
            about = {name: value for name, value in data.attrs.items() if isinstance(value, str)}
        keys = _keys(demos[0], path)
        entries = plain_names({key: key.removeprefix("obs/") for key in keys if key.startswith("obs/")}, path)
        yield RobomimicSource(path, keys, "actions", entries, ends, about, demos)


def _member(group: Any, name: str, path: Path) -> Any:
    """Return a group or array of the file itself. Raises DataError if it does not exist, or is in another file."""
    h5py = need("h5py")
    place = f"{path}: {group.name.rstrip('/')}/{name}"
    with _reading(place):
        link = group.get(name, getlink=True) if isinstance(group, h5py.Group) else None
        if link is None:
            raise DataError(
                f"{place} does not exist; the file is not a robomimic data set, or is incomplete. Fix: restore it"
            )
        if not isinstance(link, h5py.HardLink):
            raise DataError(
                f"{place} is a {type(link).__name__} to {link.path!r}; links are not followed. Fix: copy the data into one file"
            )
        return group[name]


def _group(group: Any, name: str, path: Path) -> Any:
    """Return a group of the file itself. Raises DataError if it is not a group."""
    member = _member(group, name, path)
    if not isinstance(member, need("h5py").Group):
        raise DataError(f"{path}: {member.name} is not a group; the file is not a robomimic data set. Fix: restore it")
    return member


def _names(group: Any, path: Path) -> list[str]:
    """Return the names in a group."""
    with _reading(f"{path}: {group.name}"):
        return list(group)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Convert every error of HDF5 to a DataError that names the place."""
    try:
        yield
    except DataError:
        raise
    except _FAULTS as error:
        raise DataError(f"{place} cannot be read ({error}); the file is damaged. Fix: restore the file") from error


def _keys(group: Any, path: Path, prefix: str = "") -> tuple[str, ...]:
    """Return the paths of all arrays in a demonstration, such as `actions` and `obs/…`, at any depth."""
    h5py = need("h5py")
    keys: list[str] = []
    for name in _names(group, path):
        with _reading(f"{path}: {group.name}/{name}"):
            # A link is listed, and refused when it is read.
            is_group = isinstance(group.get(name, getlink=True), h5py.HardLink) and (
                group.get(name, getclass=True) is h5py.Group
            )
        if is_group and prefix.count("/") < _DEPTH:
            keys += _keys(_group(group, name, path), path, f"{prefix}{name}/")
        elif not is_group:
            keys.append(prefix + name)
    return tuple(keys)


def _dataset(demo: Any, key: str, path: Path) -> Any:
    """Return a numeric array (L …). Raises DataError if it is anything else."""
    node = demo
    for name in key.split("/"):
        node = _member(node, name, path)
    place = f"{path}: {demo.name}/{key}"
    with _reading(place):
        _check_dataset(node, place)
    return node


def _check_dataset(node: Any, place: str) -> None:
    h5py = need("h5py")
    if not isinstance(node, h5py.Dataset) or node.ndim == 0:
        raise DataError(f"{place} is not an array of steps. Fix: omit this key")
    if node.dtype.kind not in "fiub" or node.dtype.itemsize > 8:
        raise DataError(f"{place} holds {node.dtype}; only plain numbers are read, objects never. Fix: omit this key")
    if node.external or node.is_virtual:
        raise DataError(f"{place} is stored in another file. Fix: copy the data into one file")
    filters = node.id.get_create_plist()
    numbers = [filters.get_filter(number)[0] for number in range(filters.get_nfilters())]
    unknown = [number for number in numbers if number not in _FILTERS]
    if unknown:
        raise DataError(
            f"{place} is compressed by filter {unknown[0]}, which is not part of HDF5. Fix: compress it with gzip"
        )
    if node.size and node.id.get_space_status() != h5py.h5d.SPACE_STATUS_ALLOCATED:
        raise DataError(
            f"{place} is incomplete, and HDF5 would read zeros for the missing part. Fix: create the data set again"
        )


def _length(demo: Any, path: Path) -> int:
    """Return the number of steps of a demonstration. Raises DataError if it is 0, or differs from `num_samples`."""
    steps = int(_dataset(demo, "actions", path).shape[0])
    with _reading(f"{path}: {demo.name}, num_samples"):
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
    masks = _group(file, "mask", path)
    lists = _names(masks, path)
    if subset not in lists:
        raise DataError(f"{path}: no list mask/{subset}. Fix: choose from {', '.join(lists) or 'none'}")
    node = _member(masks, subset, path)
    if not isinstance(node, h5py.Dataset) or node.ndim != 1 or h5py.check_string_dtype(node.dtype) is None:
        raise DataError(f"{path}: mask/{subset} is not a list of names. Fix: write it as an array of byte strings")
    with _reading(f"{path}: mask/{subset}"):
        return [bytes(name).decode() for name in node[()]]


def _number(name: str, path: Path) -> int:
    match = re.fullmatch(r"demo_(\d+)", name)
    if match is None:
        raise DataError(
            f"{path}: data/{name} is not a demonstration. Fix: rename it; demonstrations are named demo_0, demo_1 and so on"
        )
    return int(match[1])
