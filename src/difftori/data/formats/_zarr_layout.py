"""Reads and checks the metadata of a zarr array before decoding: numeric dtypes, known codecs, complete chunks.

The JSON is read here instead of by zarr, because zarr runs the codecs that the file names, and one of them unpickles.
"""

import itertools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from difftori.data.formats._source import read_json
from difftori.errors import DataError

_CODECS = {
    2: ("blosc", "zlib", "gzip", "bz2", "lzma", "zstd", "lz4", "shuffle", "delta"),
    3: ("bytes", "transpose", "blosc", "gzip", "zstd", "crc32c"),
}
_TYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
_TYPES += ("float16", "float32", "float64")
_META = {2: ".zarray", 3: "zarr.json"}


@final
@dataclass(frozen=True)
class ArrayLayout:
    """A numeric array in `folder`, in zarr format `version`. `codecs` are in the order of encoding."""

    folder: Path
    version: int
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    codecs: tuple[str, ...]
    prefix: str
    separator: str

    def check_chunks(self) -> None:
        """Raise DataError if a chunk is missing or truncated.

        zarr reads a missing chunk as the fill value, and blosc trusts the size in the header of a chunk.
        """
        for name in self._chunk_names():
            path = self.folder / name
            try:
                size = path.stat().st_size
                with path.open("rb") as file:
                    head = file.read(16)
            except OSError as error:
                raise DataError(
                    f"{path}: this chunk cannot be read ({error}), and zarr would replace it by the fill value. Fix: restore "
                    "it. If the data was written without empty chunks, write it again with write_empty_chunks=True"
                ) from error
            if (fault := self._chunk_fault(size, head)) is not None:
                raise DataError(f"{path}: this chunk {fault}; it is truncated or damaged. Fix: restore the file")

    def _chunk_names(self) -> Iterator[str]:
        counts = [range(-(-size // chunk)) for size, chunk in zip(self.shape, self.chunks, strict=True)]
        for index in itertools.product(*counts):
            yield self.prefix + self.separator.join(map(str, index))

    def _chunk_fault(self, size: int, head: bytes) -> str | None:
        plain = math.prod(self.chunks) * self.dtype.itemsize
        resized = "delta" in self.codecs  # it may write another type
        compressor = self.codecs[-1] if self.codecs else ""
        if compressor in ("", "bytes", "transpose"):
            return None if size == plain else f"has {size} bytes instead of {plain}"
        if compressor == "blosc":
            if len(head) < 16:
                return f"has {size} bytes, less than blosc's header"
            content, _, packed = struct.unpack("<III", head[4:16])
            if packed != size or (content != plain and not resized):
                return f"has {size} bytes for {plain}, but its header has {packed} for {content}"
        return None if size else "is empty"


def is_array(folder: Path) -> bool:
    """Return whether the folder is a zarr array."""
    return _version(folder) is not None


def read_layout(folder: Path) -> ArrayLayout:
    """Read and check the metadata. Raises DataError if it is unreadable, not numeric, or names a codec that is not allowed."""
    version = _version(folder)
    if version is None:
        raise DataError(f"{folder}: not a zarr array; the data set is incomplete. Fix: restore the data set")
    path = folder / _META[version]
    meta = read_json(path)
    try:
        layout = _layout_v2(folder, meta) if version == 2 else _layout_v3(folder, meta)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not the description of a zarr array ({type(error).__name__}: {error}). Fix: restore the file"
        ) from error
    refused = [codec for codec in layout.codecs if codec not in _CODECS[version]]
    if refused or layout.dtype.name not in _TYPES:
        what = f"the codec {refused[0]!r}" if refused else f"values of type {layout.dtype}"
        raise DataError(
            f"{path}: {what} cannot be read; only plain numbers with the codecs {', '.join(_CODECS[version])} are, pickled "
            "objects never. Fix: omit this key, or write it again as numbers"
        )
    sizes = (*layout.chunks, *(size + 1 for size in layout.shape))
    if len(layout.shape) != len(layout.chunks) or min(sizes, default=0) < 1 or layout.separator not in ("/", "."):
        raise DataError(
            f"{path}: shape {layout.shape} in chunks {layout.chunks} with separator {layout.separator!r} is invalid. "
            "Fix: restore the file"
        )
    return layout


def _version(folder: Path) -> int | None:
    return next((version for version, name in _META.items() if (folder / name).is_file()), None)


def _layout_v2(folder: Path, meta: dict[str, Any]) -> ArrayLayout:
    filters = [*(meta["filters"] or []), *([meta["compressor"]] if meta["compressor"] else [])]
    name = meta["dtype"]
    return ArrayLayout(
        folder,
        2,
        _sizes(meta["shape"]),
        _sizes(meta["chunks"]),
        np.dtype(name) if isinstance(name, str) and "O" not in name else np.dtype(object),
        tuple(str(codec["id"]) for codec in filters),
        "",
        meta.get("dimension_separator", "."),
    )


def _layout_v3(folder: Path, meta: dict[str, Any]) -> ArrayLayout:
    grid, keys, name = meta["chunk_grid"], meta["chunk_key_encoding"], meta["data_type"]
    if meta["node_type"] != "array" or grid["name"] != "regular" or keys["name"] not in ("default", "v2"):
        raise ValueError(f"a {meta['node_type']} with the grid {grid['name']} and keys {keys['name']}")
    separator = keys.get("configuration", {}).get("separator", "/" if keys["name"] == "default" else ".")
    return ArrayLayout(
        folder,
        3,
        _sizes(meta["shape"]),
        _sizes(grid["configuration"]["chunk_shape"]),
        np.dtype(name) if name in _TYPES else np.dtype(object),
        tuple(codec if isinstance(codec, str) else str(codec["name"]) for codec in meta["codecs"]),
        f"c{separator}" if keys["name"] == "default" else "",
        separator,
    )


def _sizes(values: list[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
