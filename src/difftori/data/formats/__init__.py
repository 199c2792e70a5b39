"""Demonstrations in files: the layouts of Diffusion Policy and DP3 (zarr), robomimic (HDF5) and LeRobot v3, read and written."""

from pathlib import Path

import torch

from difftori.data._columns import Storage
from difftori.data._filling import TensorWriter
from difftori.data.formats._source import Entries, load
from difftori.data.formats.lerobot import open_lerobot
from difftori.data.formats.lerobot_writer import write_lerobot
from difftori.data.formats.robomimic import open_robomimic
from difftori.data.formats.zarr_folder import open_zarr, write_zarr
from difftori.data.trajectories import Trajectories
from difftori.errors import DataError

__all__ = ["read_demos", "write_lerobot", "write_zarr"]

_HDF5 = b"\x89HDF\r\n\x1a\n"


def read_demos(
    path: Path | str,
    entries: Entries | None = None,
    *,
    action: str | None = None,
    subset: str | None = None,
    storage: Storage = "memory",
    folder: Path | None = None,
    device: torch.device | str = "cpu",
) -> Trajectories:
    """Read demonstrations. The format is detected from the content of `path`:

    - a folder with `data/*` and `meta/episode_ends`: zarr, the layout of Diffusion Policy and DP3;
    - an HDF5 file with `data/demo_k`: robomimic; `subset` is the name of a list in `mask/`;
    - a folder with `meta/info.json`: LeRobot v3; its videos are decoded.

    `entries` maps each entry to the key that is read, such as {"state": "obs/object", "image": "obs/agentview_image"}; the
    vectors of a tuple of keys are concatenated. Default: every observation, with `observation.state` and `obs/state` named
    `state`. `action` is the key of the actions. Default: the format's usual key.
    Numbers become float32. Images become uint8 (T height width C), also those stored as floats 0 … 255. `storage` selects
    where they are stored: "memory", "device" (on `device`), or "mmap", unnamed files in `folder`, for sets larger than
    memory. Default: "memory".

    Nothing in the data is executed: objects, pickles, links and unknown codecs are refused.
    Raises DataError with the file, the key, the value and a fix, and MissingExtraError without the extra `data`.
    """
    path = Path(path)
    if (storage == "mmap") != (folder is not None):
        raise DataError(
            f"{path}: storage is {storage!r} and folder {folder}. Fix: set folder if storage is 'mmap', and only then"
        )

    def writer(ends) -> TensorWriter:
        return TensorWriter(ends, storage, folder, torch.device(device))

    if _is_hdf5(path):
        with open_robomimic(path, subset) as source:
            return load(source, entries, action, writer(source.ends))
    if subset is not None:
        raise DataError(
            f"{path}: subset is {subset!r}, but only robomimic files have lists of demonstrations. Fix: omit subset"
        )
    if (path / "meta" / "info.json").is_file():
        source = open_lerobot(path)
    elif (path / "meta" / "episode_ends").is_dir():
        source = open_zarr(path)
    else:
        raise DataError(f"{path}: {_what(path)}")
    return load(source, entries, action, writer(source.ends))


def _is_hdf5(path: Path) -> bool:
    """Return whether the file has the signature or the suffix of HDF5."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(_HDF5)) == _HDF5 or path.suffix in (".hdf5", ".h5")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). Fix: check the path and its permissions") from error


def _what(path: Path) -> str:
    """Explain why the format was not recognised."""
    known = (
        "a zarr folder (data/*, meta/episode_ends), a robomimic file (.hdf5) or a LeRobot v3 folder (meta/info.json)"
    )
    if not path.exists():
        return f"no such file or folder. Fix: pass {known}"
    if path.suffix == ".zip":
        return f"an archive. Fix: unpack it, and pass {known}"
    if path.suffix == ".npz":
        return f"an archive of arrays. Fix: read it with difftori.data.demos.Demos.load, or pass {known}"
    return f"unknown format. Fix: pass {known}"
