"""Writes a collection as a data set: a zarr folder in the layout of DP3 and Diffusion Policy, and a manifest next to it.

    NAME.zarr   data/action (T A), data/… (T …), meta/episode_ends (E): the step after each episode's last
    NAME.json   description, versions, and every episode that was tried

Zarr format 2, which their code can read. The manifest is also stored in the folder's attributes.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftori.collection.episode_log import writing
from difftori.errors import DataError, MissingExtraError
from difftori.runs.checkpoint import replace_file

_CHUNK = 100
"""Number of steps in a chunk file."""


def need_zarr() -> tuple[Any, Any]:
    """Import zarr and numcodecs. Raises `MissingExtraError` if they are not installed."""
    try:
        import numcodecs
        import zarr
    except ImportError as error:
        raise MissingExtraError(
            f"difftori collect: the package {error.name!r} is not installed. Fix: pip install 'zarr>=3', which needs Python 3.11"
        ) from error
    return zarr, numcodecs


def write_dataset(
    path: Path, lengths: Sequence[int], load: Callable[[int], Mapping[str, np.ndarray]], about: Mapping[str, Any]
) -> None:
    """Write the E episodes of these lengths; `load(e)` returns the arrays of one (T …). An existing data set is replaced.

    The folder is written completely or not at all. Raises `DataError` if it cannot be written.
    """
    partial, old = path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.old")
    zarr, numcodecs = need_zarr()
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        root = zarr.create_group(partial, zarr_format=2, attributes=dict(about))
        blosc = numcodecs.Blosc(cname="zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)

        def create(group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
            return group.create_array(
                name,
                shape=shape,
                chunks=(min(_CHUNK, shape[0]), *shape[1:]),
                dtype=dtype,
                compressors=blosc,
                config={"write_empty_chunks": True},
            )

        data = root.create_group("data")
        ends = np.cumsum(lengths, dtype=np.int64)
        stored: dict[str, Any] = {}
        for episode, end in enumerate(ends):
            for name, values in load(episode).items():
                if name not in stored:
                    stored[name] = create(data, name, (int(ends[-1]), *values.shape[1:]), values.dtype)
                stored[name][int(end) - lengths[episode] : int(end)] = values
        create(root.create_group("meta"), "episode_ends", ends.shape, ends.dtype)[:] = ends
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def read_episodes(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the arrays of each episode written by `write_dataset`. Raises `DataError` if the folder is damaged."""
    zarr, _ = need_zarr()
    try:
        root = zarr.open_group(path, mode="r")
        ends = np.asarray(root["meta/episode_ends"][:])
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            yield {name: np.asarray(array[begin:end]) for name, array in root["data"].arrays()}
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Fix: remove it and collect again") from error


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest as JSON, completely or not at all."""
    with writing(path):
        replace_file(path, (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read the manifest; None if the file does not exist. Raises `DataError` if it cannot be read."""
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or not isinstance(manifest["tried"], list):
            raise ValueError("not a manifest")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Fix: remove it and collect again") from error
    return manifest
