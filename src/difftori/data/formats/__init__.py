"""Demonstrations in files: the layouts of Diffusion Policy and DP3 (zarr), robomimic (HDF5) and LeRobot v3, read and written."""

from pathlib import Path

import torch

from difftori.data._columns import Storage
from difftori.data._filling import Room
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
    """Read demonstrations; what lies at `path` says in which format they are.

    - a folder with `data/*` and `meta/episode_ends`: zarr, as Diffusion Policy and DP3 have it;
    - an HDF5 file with `data/demo_k`: robomimic's, `subset` being the name of a list in `mask/`;
    - a folder with `meta/info.json`: LeRobot v3, whose videos are decoded.

    `entries` names what is read, as {"state": "obs/object", "image": "obs/agentview_image"}; several keys, given as a
    tuple, are put side by side. Without it every observation is read, `observation.state` and `obs/state` as `state`.
    `action` is the key of the actions, where it is not the usual one.
    Numbers become float32, and images uint8 (T height width C), those kept as floats 0 … 255 too. They lie in
    `storage`: "memory", "device" (on `device`), or "mmap", nameless files in `folder`, for sets larger than memory.

    Nothing in the data is executed: objects, pickles, links and unknown codecs are refused.
    Raises DataError naming file, key, value and mend; MissingExtraError without the extra `data`.
    """
    path = Path(path)
    if (storage == "mmap") != (folder is not None):
        raise DataError(f"{path}: storage is {storage!r} and folder {folder}; give a folder for 'mmap', and only then")

    def room(ends) -> Room:
        return Room(ends, storage, folder, torch.device(device))

    if _is_hdf5(path):
        with open_robomimic(path, subset) as source:
            return load(source, entries, action, room(source.ends))
    if subset is not None:
        raise DataError(
            f"{path}: subset is {subset!r}, and only robomimic's files have lists of demonstrations; leave it out"
        )
    if (path / "meta" / "info.json").is_file():
        source = open_lerobot(path)
    elif (path / "meta" / "episode_ends").is_dir():
        source = open_zarr(path)
    else:
        raise DataError(f"{path}: {_what(path)}")
    return load(source, entries, action, room(source.ends))


def _is_hdf5(path: Path) -> bool:
    """Whether the file begins as HDF5 does, or is called so."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(_HDF5)) == _HDF5 or path.suffix in (".hdf5", ".h5")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _what(path: Path) -> str:
    """Why nothing was recognised."""
    known = "a zarr folder (data/*, meta/episode_ends), a robomimic file (.hdf5) or a LeRobot v3 folder (meta/info.json) is read"
    if not path.exists():
        return f"there is no such file or folder; {known}"
    if path.suffix == ".zip":
        return f"an archive; unpack it first: {known}"
    if path.suffix == ".npz":
        return f"an archive of arrays, which difftori.data.demos.Demos.load reads; here {known}"
    return f"no format that is known; {known}"
