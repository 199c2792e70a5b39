"""Reads HDF5 safely: only arrays of plain numbers that the file itself holds, and every error with its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from difftori.data.formats._source import need
from difftori.errors import DataError

_FAULTS = (OSError, ValueError, RuntimeError, TypeError, KeyError, MemoryError)
# deflate, shuffle, fletcher32, szip, nbit, scale-offset, lzf: others would load a plug-in.
_FILTERS = (1, 2, 3, 4, 5, 6, 32000)

_DEPTH = 16
"""Greatest depth of groups that is searched; hard links can form cycles."""


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Open the file for reading. Raises DataError if it is not HDF5, and MissingExtraError without the extra `data`."""
    h5py = need("h5py")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            f"{path}: no readable HDF5 file ({error}); it is truncated or damaged. Fix: restore the file"
        ) from error
    with file:
        yield file


def member(group: Any, name: str, path: Path) -> Any:
    """Return a group or array of the file itself. Raises DataError if it does not exist, or is in another file."""
    h5py = need("h5py")
    place = f"{path}: {group.name.rstrip('/')}/{name}"
    with reading(place):
        link = group.get(name, getlink=True) if isinstance(group, h5py.Group) else None
        if link is None:
            raise DataError(
                f"{place} does not exist; the file is another kind of data set, or incomplete. Fix: restore it"
            )
        if not isinstance(link, h5py.HardLink):
            raise DataError(
                f"{place} is a {type(link).__name__} to {link.path!r}; links are not followed. Fix: copy the data into one file"
            )
        return group[name]


def group_in(group: Any, name: str, path: Path) -> Any:
    """Return a group of the file itself. Raises DataError if it is not a group."""
    found = member(group, name, path)
    if not isinstance(found, need("h5py").Group):
        raise DataError(f"{path}: {found.name} is not a group; the file is another kind of data set. Fix: restore it")
    return found


def names_in(group: Any, path: Path) -> list[str]:
    """Return the names in a group."""
    with reading(f"{path}: {group.name}"):
        return list(group)


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Convert every error of HDF5 to a DataError that names the place."""
    try:
        yield
    except DataError:
        raise
    except _FAULTS as error:
        raise DataError(f"{place} cannot be read ({error}); the file is damaged. Fix: restore the file") from error


def array_keys(group: Any, path: Path, prefix: str = "") -> tuple[str, ...]:
    """Return the paths of all arrays in a demonstration, such as `actions` and `obs/…`, at any depth."""
    h5py = need("h5py")
    keys: list[str] = []
    for name in names_in(group, path):
        with reading(f"{path}: {group.name}/{name}"):
            # A link is listed, and refused when it is read.
            is_group = isinstance(group.get(name, getlink=True), h5py.HardLink) and (
                group.get(name, getclass=True) is h5py.Group
            )
        if is_group and prefix.count("/") < _DEPTH:
            keys += array_keys(group_in(group, name, path), path, f"{prefix}{name}/")
        elif not is_group:
            keys.append(prefix + name)
    return tuple(keys)


def array_in(demo: Any, key: str, path: Path) -> Any:
    """Return a numeric array (L …). Raises DataError if it is anything else."""
    node = demo
    for name in key.split("/"):
        node = member(node, name, path)
    place = f"{path}: {demo.name}/{key}"
    with reading(place):
        _check_dataset(node, place)
    return node


def _check_dataset(node: Any, place: str) -> None:
    h5py = need("h5py")
    if not isinstance(node, h5py.Dataset) or node.ndim == 0:
        raise DataError(f"{place} is not an array of steps. Fix: omit this key")
    if node.dtype.kind not in "fiub" or node.dtype.itemsize > 8:
        raise DataError(f"{place} holds {node.dtype}; only plain numbers are read, objects never. Fix: omit this key")
    _check_stored(node, place)


def check_contents(file: Any, path: Path) -> None:
    """Check that the file has everything in itself. Raises DataError for a link, and for an array that is not stored in it."""
    h5py = need("h5py")
    # An exception in a visitor breaks h5py, so names are collected first.
    links: dict[str, Any] = {}
    with reading(str(path)):
        file.visititems_links(links.__setitem__)
        for name, link in links.items():
            if not isinstance(link, h5py.HardLink):
                raise DataError(
                    f"{path}: /{name} is a {type(link).__name__} to {link.path!r}; links are not copied. Fix: copy the data into one file"
                )
            if isinstance(file[name], h5py.Dataset):
                _check_stored(file[name], f"{path}: /{name}")


def _check_stored(node: Any, place: str) -> None:
    """Check that an array is completely in the file, in a form that HDF5 itself can read."""
    h5py = need("h5py")
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
