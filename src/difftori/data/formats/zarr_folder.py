"""Zarr folders as Diffusion Policy and DP3 lay them out: `data/*`, one array per key, and `meta/episode_ends`."""

import lzma
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from difftori.data._filling import Part, checked_ends
from difftori.data.formats._source import Source, need, plain_names, read_json
from difftori.data.formats._writing import whole_folder
from difftori.data.formats._zarr_layout import ArrayLayout, is_array, read_layout
from difftori.data.trajectories import Trajectories
from difftori.errors import DataError

ACTION = "action"
"""The usual key of the actions."""
_CHUNK_BYTES = 2**22
# What zarr and its codecs raise for content that is not what its description says.
_FAULTS = (OSError, ValueError, RuntimeError, TypeError, KeyError, EOFError, MemoryError, zlib.error, lzma.LZMAError)


@final
@dataclass(frozen=True)
class ZarrSource(Source):
    """Keys are the arrays in `data/`."""

    def part(self, key: str) -> Part:
        """The rows of `data/key`; every chunk is looked at first."""
        place = f"{self.path}: data/{key}"
        layout = read_layout(self.path / "data" / key)
        if layout.shape[0] != self.ends[-1]:
            raise DataError(
                f"{place} has the shape {layout.shape}, and the last episode in meta/episode_ends ends at "
                f"{self.ends[-1]}; one of them is truncated: restore it"
            )
        layout.check_chunks()
        return Part(place, layout.shape[1:], _blocks(layout, place))


def open_zarr(path: Path) -> ZarrSource:
    """Look at what is there, zarr format 2 or 3. Raises DataError if it is not of that layout."""
    folder = path / "data"
    keys = tuple(sorted(child.name for child in folder.iterdir() if is_array(child))) if folder.is_dir() else ()
    if not keys:
        raise DataError(f"{path}: no arrays in data/; a data set of this kind has data/{ACTION} and observations there")
    place = f"{path}: meta/episode_ends"
    layout = read_layout(path / "meta" / "episode_ends")
    layout.check_chunks()
    ends = checked_ends(
        np.concatenate([np.zeros((0, *layout.shape[1:]), layout.dtype), *_blocks(layout, place)]), place
    )
    entries = plain_names({key: key for key in keys if key != ACTION}, path)
    return ZarrSource(path, keys, ACTION, entries, ends, _attributes(path))


def write_zarr(demos: Trajectories, path: Path | str, *, about: Mapping[str, Any] | None = None) -> None:
    """Write the episodes of this set as a zarr folder (format 2, Blosc) that Diffusion Policy and DP3 read too.

    `about`, plain JSON values, goes into its attributes in place of the set's own. The folder is there whole or not at
    all. Raises DataError if there is one already or it cannot be written, MissingExtraError without the extra `data`.
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
        raise DataError(f"{place} cannot be decoded ({error}); it is damaged: restore it") from error


def _attributes(path: Path) -> dict[str, Any]:
    """What the root group says of itself."""
    content: Any = {}
    if (path / ".zattrs").is_file():
        content = read_json(path / ".zattrs")
    elif (path / "zarr.json").is_file():
        group = read_json(path / "zarr.json")
        content = group.get("attributes", {}) if isinstance(group, dict) else {}
    return content if isinstance(content, dict) else {}


def _chunk_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Steps per chunk, of about 4 MB, and no more than there are."""
    row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    return max(1, min(shape[0], _CHUNK_BYTES // row))


def _chunks(demos: Trajectories, values: Tensor, rows: int) -> Iterator[np.ndarray]:
    """The steps of all episodes, so many rows at a time."""
    for block in demos.blocks(values, rows * values[0].numel()):
        yield block.cpu().numpy()
