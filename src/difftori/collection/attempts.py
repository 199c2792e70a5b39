"""The folder of a collection under way: a plan, and one file for each episode that was played to its end.

`plan.json` says what is collected, and is the last to come when the folder is set up and the first to go when the data
set is written. Every file is there whole or not at all, so a kill costs the running episodes only.
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

from difftori.collection.play import Attempt
from difftori.errors import ConfigError, DataError
from difftori.runs.checkpoint import replace_file
from difftori.runs.locks import hold

_PLAN = "plan.json"
_HEAD = "_attempt"
"""Name of the array (index, seed, steps, first success or −1) beside those of the data set."""

_UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)

_log = logging.getLogger(__name__)


class Attempts:
    """Attempts by number, in `folder`. Use `open_attempts`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._known: dict[int, Attempt] = {}
        for path in sorted(folder.glob("*.npz")):
            head = _head(path)
            if head is None:
                _log.warning("%s: damaged, so this episode is played again", path)
                path.unlink()
            else:
                self._known[head.index] = head

    def __contains__(self, index: int) -> bool:
        return index in self._known

    def __getitem__(self, index: int) -> Attempt:
        """What is known of it, without its arrays."""
        return self._known[index]

    def record(self, attempt: Attempt) -> None:
        """Write it. Raises `DataError` if the disk is full or gone."""
        first = -1 if attempt.first_success is None else attempt.first_success
        content = io.BytesIO()
        head = np.array([attempt.index, attempt.seed, attempt.steps, first], dtype=np.int64)
        np.savez(content, **{_HEAD: head}, **attempt.arrays)
        with writing(self.folder):
            replace_file(self._path(attempt.index), content.getvalue())
        self._known[attempt.index] = replace(attempt, arrays={})

    def load(self, index: int) -> dict[str, np.ndarray]:
        """Its arrays (T …). Raises `DataError` if they have become unreadable."""
        try:
            with np.load(self._path(index), allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files if name != _HEAD}
        except _UNREADABLE as error:
            raise DataError(f"{self._path(index)}: cannot be read ({error}); remove it and collect again") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npz"


@contextmanager
def open_attempts(folder: Path, plan: Mapping[str, Any], kept: Iterator[Attempt]) -> Iterator[Attempts]:
    """The attempts of this plan in `folder`, which no other process uses meanwhile; a new one begins with `kept`.

    Raises `ConfigError` if the folder holds another plan's or is in use, and `DataError` if it cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    with lock:
        try:
            hold(lock)
        except BlockingIOError as error:
            raise ConfigError([f"out: {folder} is in use by another process; wait, or choose another --out"]) from error
        before = read_plan(folder)
        if before is not None:
            refuse_other(before, plan, folder)
            yield Attempts(folder)
            return
        with writing(folder):
            for path in folder.glob("*.npz"):
                path.unlink()
        attempts = Attempts(folder)
        for attempt in kept:
            attempts.record(attempt)
        with writing(folder):
            replace_file(folder / _PLAN, (json.dumps(plan, indent=1) + "\n").encode())
        yield attempts


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan in a folder, or None where nothing is under way."""
    try:
        plan = json.loads((folder / _PLAN).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / _PLAN}: cannot be read ({error}); remove {folder} and collect again") from error
    return plan if isinstance(plan, dict) else {}


def refuse_other(before: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> None:
    """Raise `ConfigError`, naming each difference, if two plans differ."""
    faults = [
        f"{name}: {now.get(name)!r} here, {before.get(name)!r} there"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if faults:
        raise ConfigError([*faults, f"out: {place} is another collection; choose another --out, or remove it"])


def close_attempts(folder: Path) -> None:
    """Remove the folder of a collection that has become a data set."""
    (folder / _PLAN).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusals into a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); free space, or choose another --out") from error


def _head(path: Path) -> Attempt | None:
    """What is known of an attempt, or None if its file is damaged anywhere."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        with np.load(path, allow_pickle=False) as archive:
            index, seed, steps, first = (int(number) for number in archive[_HEAD])
    except _UNREADABLE:
        return None
    return Attempt(index, seed, steps, None if first < 0 else first, {})
