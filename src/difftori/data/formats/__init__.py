"""Demonstrations in files: the layouts of Diffusion Policy and DP3 (zarr), robomimic and ManiSkill (HDF5), and LeRobot v3 and v2."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from difftori.data._columns import Storage
from difftori.data._filling import TensorWriter
from difftori.data.formats._keys import action_key, chosen_entries, chosen_episodes, episodes_of, find_key
from difftori.data.formats._source import Entries, Source
from difftori.data.formats.description import DemosDescription, describe
from difftori.data.formats.lerobot import open_lerobot
from difftori.data.formats.lerobot_writer import write_lerobot
from difftori.data.formats.maniskill import holds_trajectories, open_maniskill
from difftori.data.formats.robomimic import open_robomimic
from difftori.data.formats.zarr_folder import open_zarr, write_zarr
from difftori.data.trajectories import Trajectories, make_spans
from difftori.errors import DataError

__all__ = [
    "DemosDescription",
    "Entries",
    "describe_demos",
    "find_set",
    "has_keys",
    "read_demos",
    "write_lerobot",
    "write_zarr",
]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_KNOWN = (
    "a zarr folder (data/*, meta/episode_ends), a robomimic file (.hdf5), a ManiSkill file (.h5 and .json) or a LeRobot "
    "folder (meta/info.json)"
)


def read_demos(
    path: Path | str,
    entries: Entries | None = None,
    *,
    action: str | None = None,
    episodes: Sequence[str | int] | None = None,
    subset: str | None = None,
    storage: Storage = "memory",
    folder: Path | None = None,
    device: torch.device | str = "cpu",
) -> Trajectories:
    """Read demonstrations. The format is detected from the content of `path`:

    - a folder with `data/*` and `meta/episode_ends`: zarr, the layout of Diffusion Policy and DP3;
    - an HDF5 file with `data/demo_k`: robomimic; `subset` is the name of a list in `mask/`;
    - an HDF5 file with `traj_k`, and a JSON file of the same name: ManiSkill, with states or point clouds;
    - a folder with `meta/info.json`: LeRobot v3 or v2; its videos are decoded, and `subset` is the text of a task;
    - a folder that contains exactly one of these.

    `entries` maps each entry to the key that is read, such as {"state": "obs/object", "image": "obs/agentview_image"}; the
    vectors of a tuple of keys are concatenated. Short names are keys too: `state` is `observation.state` or `obs/state`, and
    `image` is the only camera. A list of words has the same meaning: ["state=obs/object", "agentview_image"]. Default: every
    observation under its short name, in zarr also without other keys that begin with `action`. `action` is the key of the actions. Default: `action` or `actions`. `episodes` are the
    episodes to read, as numbers and ranges: ["0:50", 60]. Default: all.

    Images become uint8 (T height width C), also those with the channels first, without a channel dimension, or stored as
    floats: integers 0 … 255, or multiples of 1/255 from 0 to 1. All other numbers become float32, also masks of 0.0 and 1.0
    and depth images, (T height width 1). `storage` selects where they are stored: "memory", "device" (on `device`), or
    "mmap", unnamed files in `folder`, for sets larger than memory. Default: "memory".

    Nothing in the data is executed: objects, pickles, links and unknown codecs are refused.
    Raises DataError with the file, the key, the value and a fix, and MissingExtraError without the extra `data`.
    """
    path = find_set(Path(path))
    if (storage == "mmap") != (folder is not None):
        raise DataError(
            f"{path}: storage is {storage!r} and folder {folder}. Fix: set folder if storage is 'mmap', and only then"
        )
    with _opened(path, subset) as source:
        key = action_key(source, action)
        chosen = chosen_entries(source, entries, key)
        kept = None if episodes is None else chosen_episodes(episodes, len(source.ends), str(path))
        if subset is not None and source.tasks:
            kept = episodes_of(source, subset, kept)
        writer = TensorWriter.of(source.ends, kept, storage, folder, device)
        part = source.field(key)
        if len(part.shape) > 1:
            raise DataError(f"{part.place}: an action has the shape {part.shape}; actions must be (T A)")
        # All keys are opened before the first one is read, which may take minutes.
        fields = {name: [source.field(one) for one in keys] for name, keys in chosen.items()}
        obs = {name: writer.fill(parts) for name, parts in fields.items()}
        return Trajectories(obs, writer.fill([part]), make_spans(writer.ends), source.about, _counts(source, kept))


def _counts(source: Source, kept: Sequence[int] | None) -> dict[str, int]:
    """Return the number of episodes of each task, among those that are kept (default: all); empty if they are of one task."""
    chosen = None if kept is None else set(kept)
    counts = {t: sum(chosen is None or e in chosen for e in episodes) for t, episodes in source.tasks.items()}
    found = {task: count for task, count in counts.items() if count}
    return found if len(found) > 1 else {}


def describe_demos(path: Path | str) -> DemosDescription:
    """Describe the data set at `path`, of any format that `read_demos` reads. Raises the same errors. Images are not decoded."""
    with _opened(find_set(Path(path)), None) as source:
        return describe(source)


def has_keys(path: Path | str, names: Sequence[str]) -> bool:
    """Return whether all these names refer to keys of the data set at `path`. Raises the errors of `read_demos`."""
    with _opened(find_set(Path(path)), None) as source:
        return all(find_key(source, name) is not None for name in names)


def find_set(path: Path) -> Path:
    """Return the data set at `path`: `path` itself, or the only data set in this folder.

    Raises DataError if there are several, naming them, or if `path` is not of a known format.
    """
    if _is_set(path):
        return path
    inside = [child for child in sorted(path.iterdir()) if _is_set(child)] if path.is_dir() else []
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise DataError(
            f"{path}: contains {len(inside)} data sets. Fix: choose one of {', '.join(str(child) for child in inside)}"
        )
    raise DataError(f"{path}: {_what(path)}")


@contextmanager
def _opened(path: Path, subset: str | None) -> Iterator[Source]:
    if _is_hdf5(path) and not holds_trajectories(path):
        with open_robomimic(path, subset) as source:
            yield source
        return
    if _is_hdf5(path):
        with open_maniskill(path) as source:
            yield _with_tasks(source, subset)
        return
    yield _with_tasks(open_lerobot(path) if (path / "meta" / "info.json").is_file() else open_zarr(path), subset)


def _with_tasks(source: Source, subset: str | None) -> Source:
    """Return the source. Raises DataError for a subset of a data set without tasks."""
    if subset is not None and not source.tasks:
        raise DataError(
            f"{source.path}: subset is {subset!r}, but the data set has neither tasks nor lists of demonstrations. Fix: omit subset, "
            "or choose episodes by number"
        )
    return source


def _is_set(path: Path) -> bool:
    return (path / "meta" / "info.json").is_file() or (path / "meta" / "episode_ends").is_dir() or _is_hdf5(path)


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
    if not path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        return f"no such file or folder{where}. Fix: pass {_KNOWN}"
    if path.suffix == ".zip":
        return f"an archive. Fix: unpack it, and pass {_KNOWN}"
    if path.suffix == ".npz":
        return f"an archive of arrays. Fix: read it with difftori.data.demos.Demos.load, or pass {_KNOWN}"
    return f"unknown format. Fix: pass {_KNOWN}"
