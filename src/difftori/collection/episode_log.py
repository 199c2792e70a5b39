"""The folder of a collection in progress: a plan, and one file for each finished episode.

`plan.json` describes the collection. It is written last when the folder is created, and removed first when the data set is
complete. Every file is written atomically, so a killed process loses only the running episodes.
"""

import io
import json
import logging
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from difftori.collection.play import ExpertEpisode
from difftori.errors import ConfigError, DataError
from difftori.runs.checkpoint import replace_file
from difftori.runs.process import hold, removed_on_error

_PLAN = "plan.json"
_HEAD = "_attempt"
"""Name of the array (index, seed, steps, first success or −1) that is stored with those of the data set."""

UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""Errors of a damaged file of arrays (npz)."""

_log = logging.getLogger(__name__)


class EpisodeLog:
    """The recorded episodes in `folder`, by number. Use `open_log` to create one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._known: dict[int, ExpertEpisode] = {}
        for path in sorted(folder.glob("*.npz")):
            head = _head(path)
            if head is None:
                _log.warning("%s: damaged; the episode is run again", path)
                path.unlink()
            else:
                self._known[head.index] = head

    def __contains__(self, index: int) -> bool:
        return index in self._known

    def __getitem__(self, index: int) -> ExpertEpisode:
        """Return the episode without its arrays."""
        return self._known[index]

    def record(self, episode: ExpertEpisode) -> None:
        """Write the episode to disk. Raises `DataError` if it cannot be written."""
        first = -1 if episode.first_success is None else episode.first_success
        content = io.BytesIO()
        head = np.array([episode.index, episode.seed, episode.steps, first], dtype=np.int64)
        np.savez(content, **{_HEAD: head}, **episode.arrays)
        with writing(self.folder):
            replace_file(self._path(episode.index), content.getvalue())
        self._known[episode.index] = replace(episode, arrays={})

    def load(self, index: int) -> dict[str, np.ndarray]:
        """Read the arrays (T …) of an episode. Raises `DataError` if its file cannot be read."""
        try:
            with np.load(self._path(index), allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files if name != _HEAD}
        except UNREADABLE as error:
            raise DataError(
                f"{self._path(index)}: cannot be read ({error}). Fix: remove it and collect again"
            ) from error

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npz"


@contextmanager
def open_log(folder: Path, plan: Mapping[str, Any], kept: Iterator[ExpertEpisode]) -> Iterator[EpisodeLog]:
    """Open the log of this plan in `folder`, locked against other processes. A new log starts with the episodes `kept`.

    Raises `ConfigError` if the folder holds the log of another plan or is in use, and `DataError` if it cannot be written.
    """
    held = False
    with removed_on_error(folder, lambda: not held or any(folder.glob("*.npz"))):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("a")
        with lock:
            try:
                hold(lock)
            except BlockingIOError as error:
                raise ConfigError(
                    [f"out: {folder} is in use by another process. Fix: wait, or choose another --out"]
                ) from error
            held = True
            yield _begun(folder, plan, kept)


def _begun(folder: Path, plan: Mapping[str, Any], kept: Iterator[ExpertEpisode]) -> EpisodeLog:
    """Return the log in the folder, or a new one."""
    before = read_plan(folder)
    if before is not None:
        refuse_other(before, plan, folder)
        return EpisodeLog(folder)
    with writing(folder):
        for path in folder.glob("*.npz"):
            path.unlink()
    log = EpisodeLog(folder)
    for episode in kept:
        log.record(episode)
    with writing(folder):
        replace_file(folder / _PLAN, (json.dumps(plan, indent=1) + "\n").encode())
    return log


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Read the plan in a folder; None if no collection is in progress. Raises `DataError` if it cannot be read."""
    try:
        plan = json.loads((folder / _PLAN).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / _PLAN}: cannot be read ({error}). Fix: remove {folder} and run the command again"
        ) from error
    return plan if isinstance(plan, dict) else {}


def refuse_other(before: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> None:
    """Raise `ConfigError` with all differences if two plans differ."""
    faults = [
        f"{name}: {now.get(name)!r} here, {before.get(name)!r} there"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if faults:
        raise ConfigError(
            [*faults, f"out: {place} was made by another request. Fix: choose another --out, or remove it"]
        )


def remove_log(folder: Path) -> None:
    """Remove the folder of a completed collection."""
    (folder / _PLAN).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` into a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}). Fix: free space, or choose another --out") from error


def is_intact(path: Path) -> bool:
    """Whether a file of arrays (npz) exists and is not damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except UNREADABLE:
        return False


def _head(path: Path) -> ExpertEpisode | None:
    """Read the episode of a file without its arrays; None if the file is damaged."""
    try:
        if not is_intact(path):
            return None
        with np.load(path, allow_pickle=False) as archive:
            index, seed, steps, first = (int(number) for number in archive[_HEAD])
    except UNREADABLE:
        return None
    return ExpertEpisode(index, seed, steps, None if first < 0 else first, {})
