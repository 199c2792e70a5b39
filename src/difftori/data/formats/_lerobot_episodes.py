"""The episodes of a LeRobot data set: their ends, the files of their steps, and the frames of their cameras. Versions 3 and 2 differ in these."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np

from difftori.data._filling import checked_ends
from difftori.data.formats._lerobot_layout import (
    DATA_PATH,
    DATA_PATH_V2,
    EPISODES_V2,
    FILES_PER_CHUNK,
    VIDEO_PATH,
    VIDEO_PATH_V2,
    data_file,
    data_file_v2,
    video_file,
    video_file_v2,
)
from difftori.data.formats._parquet import as_numbers, has_column, read_batches
from difftori.data.formats._source import parse_json
from difftori.errors import DataError

_ROWS = 1024

Clip: TypeAlias = tuple[Path, np.ndarray]
"""A video file, and the times in seconds of its frames that are steps, in order."""


@final
@dataclass(frozen=True)
class Episodes:
    """The ends of the episodes (E) in steps, the parquet files of all steps in order, and the clips of a camera by its key.

    `tasks`: the instructions of each episode, usually one; no entry if the data set has none.
    """

    ends: np.ndarray
    files: tuple[Path, ...]
    clips: Callable[[str], Iterator[Clip]]
    tasks: tuple[tuple[str, ...], ...]

    def by_task(self) -> dict[str, tuple[int, ...]]:
        """Return the episodes of each task, in the order in which the tasks first occur."""
        found: dict[str, list[int]] = {}
        for episode, tasks in enumerate(self.tasks):
            for task in dict.fromkeys(tasks):
                found.setdefault(task, []).append(episode)
        return {task: tuple(episodes) for task, episodes in found.items()}


def read_episodes(path: Path, info: dict[str, Any]) -> Episodes:
    """Read them, and check that the steps in the files are theirs. Raises DataError if they are not, or for another version."""
    version = str(info.get("codebase_version"))
    known = {"v3.": (_read_v3, DATA_PATH, VIDEO_PATH), "v2.": (_read_v2, DATA_PATH_V2, VIDEO_PATH_V2)}
    if version[:3] not in known:
        raise DataError(
            f"{path}: meta/info.json has codebase_version {version}, but v3 and v2 are read. Fix: convert it with LeRobot's scripts"
        )
    read, *usual = known[version[:3]]
    for name, expected in zip(("data_path", "video_path"), usual, strict=True):
        if info.get(name) not in (None, expected):
            raise DataError(
                f"{path}: meta/info.json has {name} {info[name]!r}, but only {expected!r} is read. Fix: rename the files"
            )
    episodes = read(path, info)
    count, steps = len(episodes.ends), int(episodes.ends[-1])
    for name, found in (("total_episodes", count), ("total_frames", steps)):
        if info.get(name, found) != found:
            raise DataError(
                f"{path}: meta/info.json has {name} {info[name]}, meta/episodes {found}. Fix: restore both files"
            )
    _check_steps(episodes)
    return episodes


def _read_v3(path: Path, info: dict[str, Any]) -> Episodes:
    """Several episodes share a file of steps, and a video."""
    names = ["length", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
    columns = _episode_columns(path, names)
    place = f"{path}: meta/episodes"
    lengths, begins, ends, chunks, numbers = (columns[name].astype(np.int64) for name in names)
    ends = checked_ends(ends, place)
    if (np.diff(ends, prepend=0) != lengths).any() or (ends - lengths != begins).any():
        raise DataError(
            f"{place}: length, dataset_from_index and dataset_to_index contradict each other. Fix: restore the file"
        )
    files = tuple(data_file(path, int(c), int(n)) for c, n in dict.fromkeys(zip(chunks, numbers, strict=True)))

    def clips(key: str) -> Iterator[Clip]:
        names = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        columns = _episode_columns(path, names)
        chunks, files, begins = (columns[name] for name in names)
        if not np.isfinite(begins).all():
            raise DataError(f"{path}: meta/episodes, {names[2]}, holds NaN or Inf. Fix: restore the file")
        fps = frames_per_second(path, info)
        for (chunk, file), group in groupby(range(len(lengths)), key=lambda episode: (chunks[episode], files[episode])):
            times = [begins[episode] + np.arange(lengths[episode]) / fps for episode in group]
            yield video_file(path, key, int(chunk), int(file)), np.concatenate(times)

    return Episodes(ends, files, clips, _tasks(path))


def _read_v2(path: Path, info: dict[str, Any]) -> Episodes:
    """Every episode has its own file of steps, and its own video of each camera."""
    place = path / EPISODES_V2
    rows = _rows_v2(place)
    lengths = [row["length"] for row in rows]
    ends = checked_ends(np.cumsum(lengths), str(place))
    chunks = info.get("chunks_size", FILES_PER_CHUNK)
    if not isinstance(chunks, int) or chunks < 1:
        raise DataError(f"{path}: meta/info.json has chunks_size {chunks!r}. Fix: restore the file")

    def clips(key: str) -> Iterator[Clip]:
        fps = frames_per_second(path, info)
        for episode, length in enumerate(lengths):
            yield video_file_v2(path, key, episode // chunks, episode), np.arange(length) / fps

    files = tuple(data_file_v2(path, e // chunks, e) for e in range(len(lengths)))
    return Episodes(ends, files, clips, _texts([row.get("tasks") for row in rows]))


def _rows_v2(place: Path) -> list[dict[str, Any]]:
    """Read what the file says of each episode, in their order: `length`, and usually `tasks`."""
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = place.read_text(encoding="utf-8").split("\n")  # texts may contain other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{place}: not readable ({error}); the data set is incomplete. Fix: restore the file"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{place}, line {number}")
        index, length = (row.get(name) if isinstance(row, dict) else None for name in ("episode_index", "length"))
        if not isinstance(index, int) or not isinstance(length, int) or index in found:
            raise DataError(f"{place}, line {number}: no further episode with its length. Fix: restore the file")
        found[index] = row
    if sorted(found) != list(range(len(found))):
        raise DataError(f"{place}: does not list each episode exactly once, from 0 on. Fix: restore the file")
    return [found[index] for index in range(len(found))]


def frames_per_second(path: Path, info: dict[str, Any]) -> float:
    """Return the number of steps per second. Raises DataError if it is no number above 0."""
    fps = info.get("fps")
    if not isinstance(fps, (int, float)) or not 0 < fps < 1e6:
        raise DataError(f"{path}: meta/info.json has fps {fps!r}; it must be a number above 0. Fix: restore the file")
    return float(fps)


def _episode_files(path: Path) -> list[Path]:
    files = sorted((path / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise DataError(
            f"{path}: no meta/episodes/chunk-*/file-*.parquet; the data set is incomplete. Fix: restore the file"
        )
    return files


def _episode_columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read columns of one number per episode (E) from `meta/episodes`, in the order of the episodes."""
    wanted = ["episode_index", *names]
    blocks = {name: [] for name in wanted}
    for file in _episode_files(path):
        for columns in read_batches(file, wanted, _ROWS):
            for name, column in zip(wanted, columns, strict=True):
                blocks[name].append(as_numbers(column, (), f"{file}: {name}"))
    table = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in blocks.items()}
    order = np.argsort(table["episode_index"], kind="stable")
    if not np.array_equal(table["episode_index"][order], np.arange(len(order))):
        raise DataError(
            f"{path}: meta/episodes does not list each episode exactly once, from 0 on. Fix: restore the file"
        )
    return {name: table[name][order] for name in names}


def _tasks(path: Path) -> tuple[tuple[str, ...], ...]:
    """Read the tasks of each episode from `meta/episodes`; none if there is no such column."""
    found: dict[int, Any] = {}
    for file in _episode_files(path):
        if not has_column(file, "tasks"):
            return ()
        for numbers, tasks in read_batches(file, ["episode_index", "tasks"], _ROWS):
            found.update(zip(numbers.to_pylist(), tasks.to_pylist(), strict=True))
    return _texts([found[number] for number in sorted(found)])


def _texts(tasks: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    """Return the tasks of each episode: a list of texts, or a text. What is none is left out, because all else can be read without."""
    lists = [[each] if isinstance(each, str) else each if isinstance(each, list) else [] for each in tasks]
    return tuple(tuple(task for task in each if isinstance(task, str)) for each in lists)


def _check_steps(episodes: Episodes) -> None:
    """Raise DataError unless the steps in the files are those of the episodes, in order."""
    done = 0
    for path in episodes.files:
        for (column,) in read_batches(path, ["episode_index"], 64 * _ROWS):
            found = as_numbers(column, (), f"{path}: episode_index")
            expected = np.searchsorted(episodes.ends, np.arange(done, done + len(found)), side="right")
            if not np.array_equal(found, expected):
                raise DataError(
                    f"{path}: its steps are not those of the episodes in meta/episodes. Fix: restore both files"
                )
            done += len(found)
    if done != episodes.ends[-1]:
        raise DataError(
            f"{episodes.files[-1]}: {done} steps up to its end, but meta/episodes has {episodes.ends[-1]}. Fix: restore the file"
        )
