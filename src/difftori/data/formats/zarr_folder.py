"""Reads and writes zarr folders in the layout of Diffusion Policy and DP3: `data/*`, one array per key, `meta/episode_ends`."""

import lzma
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from difftori.data._filling import Field, checked_ends
from difftori.data.formats._source import Source, need, plain_names, read_json
from difftori.data.formats._writing import whole_folder
from difftori.data.formats._zarr_layout import ArrayLayout, is_array, read_layout
from difftori.data.trajectories import Trajectories
from difftori.errors import DataError

ACTION = "action"
"""The usual key of the actions."""
_CHUNK_BYTES = 2**22
# Exceptions of zarr and its codecs for content that does not match the metadata.
_FAULTS = (OSError, ValueError, RuntimeError, TypeError, KeyError, EOFError, MemoryError, zlib.error, lzma.LZMAError)


@final
@dataclass(frozen=True)
class ZarrSource(Source):
    """A zarr folder. Keys are the arrays in `data/`."""

    def field(self, key: str) -> Field:
        """Return the rows of `data/key`, after a check of every chunk."""
        place = f"{self.path}: data/{key}"
        layout = read_layout(self.path / "data" / key)
        if layout.shape[0] != self.ends[-1]:
            raise DataError(
                f"{place} has the shape {layout.shape}, but the last episode in meta/episode_ends ends at "
                f"{self.ends[-1]}; one of them is truncated. Fix: restore it"
            )
        layout.check_chunks()
        return Field(place, layout.shape[1:], _blocks(layout, place))


def open_zarr(path: Path) -> ZarrSource:
    """Open a zarr folder, format 2 or 3. Raises DataError if its layout is different."""
    folder = path / "data"
    keys = tuple(sorted(child.name for child in folder.iterdir() if is_array(child))) if folder.is_dir() else ()
    if not keys:
        raise DataError(f"{path}: no arrays in data/. Fix: restore data/{ACTION} and the observations")
    place = f"{path}: meta/episode_ends"
    layout = read_layout(path / "meta" / "episode_ends")
    layout.check_chunks()
    ends = checked_ends(
        np.concatenate([np.zeros((0, *layout.shape[1:]), layout.dtype), *_blocks(layout, place)]), place
    )
    entries = plain_names({key: key for key in keys if not key.startswith(ACTION)}, path)
    return ZarrSource(path, keys, ACTION, entries, ends, _attributes(path))


def write_zarr(demos: Trajectories, path: Path | str, *, about: Mapping[str, Any] | None = None) -> None:
    """Write the episodes of this set atomically as a zarr folder (format 2, Blosc), as Diffusion Policy and DP3 read it.

    `about`, plain JSON values, is written to the attributes. Default: the set's own `about`. Raises DataError if `path`
    exists or cannot be written, and MissingExtraError without the extra `data`.
    """
    path = Path(path)
    zarr, numcodecs = need("zarr"), need("numcodecs")
    blosc = numcodecs.Blosc(cname="zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)
    with whole_folder(path) as folder:
        attributes = dict(demos.about if about is None else about)
        root = zarr.create_group(folder, zarr_format=2, attributes=attributes)
        data = root.create_group("data")
        steps = sum(demos.lengths)

        def write(group: Any, key: str, blocks: Iterator[np.ndarray], shape: tuple[int, ...], dtype: Any) -> None:
            rows = _chunk_rows(shape, np.dtype(dtype))
            array = group.create_array(
                key,
                shape=shape,
                chunks=(rows, *shape[1:]),
                dtype=dtype,
                compressors=blosc,
                config={"write_empty_chunks": True},
            )
            done = 0
            for block in blocks:
                array[done : done + len(block)] = block
                done += len(block)

        for key, values in {**demos.obs, ACTION: demos.actions}.items():
            shape = (steps, *values.shape[1:])
            dtype = "uint8" if values.dtype.itemsize == 1 else "float32"
            write(data, key, _chunks(demos, values, _chunk_rows(shape, np.dtype(dtype))), shape, dtype)
        ends = np.cumsum(demos.lengths).astype(np.int64)
        write(root.create_group("meta"), "episode_ends", iter([ends]), ends.shape, "int64")


def _blocks(layout: ArrayLayout, place: str) -> Iterator[np.ndarray]:
    zarr = need("zarr")
    try:
        array = zarr.open_array(layout.folder, mode="r", zarr_format=layout.version)
        for start in range(0, layout.shape[0], layout.chunks[0]):
            yield np.asarray(array[start : start + layout.chunks[0]])
    except _FAULTS as error:
        raise DataError(f"{place} cannot be decoded ({error}); it is damaged. Fix: restore the file") from error


def _attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of the root group."""
    content: Any = {}
    if (path / ".zattrs").is_file():
        content = read_json(path / ".zattrs")
    elif (path / "zarr.json").is_file():
        group = read_json(path / "zarr.json")
        content = group.get("attributes", {}) if isinstance(group, dict) else {}
    return content if isinstance(content, dict) else {}


def _chunk_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the steps per chunk, for about 4 MB, at most the number of steps."""
    row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    return max(1, min(shape[0], _CHUNK_BYTES // row))


def _chunks(demos: Trajectories, values: Tensor, rows: int) -> Iterator[np.ndarray]:
    """Iterate over the steps of all episodes, `rows` at a time."""
    for block in demos.blocks(values, rows * values[0].numel()):
        yield block.cpu().numpy()
