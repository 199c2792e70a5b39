"""Reads LeRobot v3: `meta/info.json`, `meta/episodes`, steps in `data/*.parquet`, cameras there or in `videos/*.mp4`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, final

import numpy as np

from difftori.data._filling import Field, checked_ends
from difftori.data.formats._lerobot_layout import (
    ACTION,
    BOOKKEEPING,
    DATA_PATH,
    IMAGES,
    OBSERVATION,
    VIDEO_PATH,
    data_file,
    parse_feature,
    video_file,
)
from difftori.data.formats._parquet import as_numbers, read_batches
from difftori.data.formats._source import Source, need, plain_names, read_json
from difftori.data.formats._video import decode_image, read_frames
from difftori.errors import DataError

_ROWS = 1024
_IMAGES = 64


@final
@dataclass(frozen=True)
class LeRobotSource(Source):
    """A LeRobot v3 data set. Keys are the recorded features; `files` are the files of steps; `info` is `meta/info.json`."""

    files: tuple[Path, ...]
    info: dict[str, Any]

    def field(self, key: str) -> Field:
        """Return the rows of a key: numbers and images from the parquet files, videos from the video files."""
        place = f"{self.path}: {key}"
        feature = parse_feature(self.info["features"][key], place)
        if feature.kind == "video":
            return Field(place, feature.shape, self._frames(key, feature.shape[2]))
        blocks = self._numbers if feature.kind == "numbers" else self._images
        return Field(place, feature.shape, blocks(key, feature.shape))

    def _numbers(self, key: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        for path in self.files:
            for (column,) in read_batches(path, [key], _ROWS):
                yield as_numbers(column, shape, f"{path}: {key}")

    def _images(self, key: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        for path in self.files:
            for (column,) in read_batches(path, [key], _IMAGES):
                yield np.stack([_image(content, shape, f"{path}: {key}") for content in _contents(column, path, key)])

    def _frames(self, key: str, channels: int) -> Iterator[np.ndarray]:
        names = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        columns = _episode_columns(self.path, names)
        chunks, files, begins = (columns[name] for name in names)
        if not np.isfinite(begins).all():
            raise DataError(f"{self.path}: meta/episodes, {names[2]}, holds NaN or Inf. Fix: restore the file")
        fps, lengths = _fps(self.info, self.path), np.diff(self.ends, prepend=0)
        for (chunk, file), group in groupby(range(len(lengths)), key=lambda episode: (chunks[episode], files[episode])):
            times = [begins[episode] + np.arange(lengths[episode]) / fps for episode in group]
            path = video_file(self.path, key, int(chunk), int(file))
            yield from read_frames(path, np.concatenate(times), 0.499 / fps, channels)


def open_lerobot(path: Path) -> LeRobotSource:
    """Read the metadata and the episodes, and check that the steps match them.

    Raises DataError if they do not, and MissingExtraError without the extra `data`.
    """
    info = _info(path)
    names = ["length", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
    columns = _episode_columns(path, names)
    place = f"{path}: meta/episodes"
    lengths, begins, ends, chunks, numbers = (columns[name].astype(np.int64) for name in names)
    ends = checked_ends(ends, place)
    if (np.diff(ends, prepend=0) != lengths).any() or (ends - lengths != begins).any():
        raise DataError(
            f"{place}: length, dataset_from_index and dataset_to_index contradict each other. Fix: restore the file"
        )
    for name, count in (("total_episodes", len(ends)), ("total_frames", int(ends[-1]))):
        if info.get(name, count) != count:
            raise DataError(
                f"{path}: meta/info.json has {name} {info[name]}, meta/episodes {count}. Fix: restore both files"
            )
    files = tuple(data_file(path, int(c), int(n)) for c, n in dict.fromkeys(zip(chunks, numbers, strict=True)))
    _check_steps(files, ends)
    keys = tuple(key for key in info["features"] if key not in BOOKKEEPING)
    observed = {
        key: key.removeprefix(IMAGES).removeprefix(OBSERVATION)
        for key in keys
        if key.startswith(OBSERVATION) and not _is_text(info["features"][key])
    }
    about = {name: info[name] for name in ("fps", "robot_type") if info.get(name) is not None}
    return LeRobotSource(path, keys, ACTION, plain_names(observed, path), ends, about, files, info)


def _is_text(feature: Any) -> bool:
    """Whether a feature is text, such as an instruction, which no policy here reads."""
    return isinstance(feature, dict) and feature.get("dtype") == "string"


def _info(path: Path) -> dict[str, Any]:
    place = path / "meta" / "info.json"
    info = read_json(place)
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict):
        raise DataError(f"{place}: not the metadata of a LeRobot data set with features. Fix: restore the file")
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        raise DataError(
            f"{place}: codebase_version is {version}, but only v3 is read. Fix: convert it with LeRobot's script "
            "(lerobot.datasets.v30.convert_dataset_v21_to_v30)"
        )
    for name, usual in (("data_path", DATA_PATH), ("video_path", VIDEO_PATH)):
        if info.get(name) not in (None, usual):
            raise DataError(f"{place}: {name} is {info[name]!r}, but only {usual!r} is read. Fix: rename the files")
    return info


def _fps(info: dict[str, Any], path: Path) -> float:
    fps = info.get("fps")
    if not isinstance(fps, (int, float)) or not 0 < fps < 1e6:
        raise DataError(f"{path}: meta/info.json has fps {fps!r}; it must be a number above 0. Fix: restore the file")
    return float(fps)


def _episode_columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read columns of one number per episode (E) from `meta/episodes`, in the order of the episodes."""
    files = sorted((path / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise DataError(
            f"{path}: no meta/episodes/chunk-*/file-*.parquet; the data set is incomplete. Fix: restore the file"
        )
    wanted = ["episode_index", *names]
    blocks = {name: [] for name in wanted}
    for file in files:
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


def _check_steps(files: Sequence[Path], ends: np.ndarray) -> None:
    """Raise DataError unless the steps in the files are those of the episodes, in order."""
    done = 0
    for path in files:
        for (column,) in read_batches(path, ["episode_index"], 64 * _ROWS):
            found = as_numbers(column, (), f"{path}: episode_index")
            expected = np.searchsorted(ends, np.arange(done, done + len(found)), side="right")
            if not np.array_equal(found, expected):
                raise DataError(
                    f"{path}: its steps are not those of the episodes in meta/episodes. Fix: restore both files"
                )
            done += len(found)
    if done != ends[-1]:
        raise DataError(
            f"{files[-1]}: {done} steps up to its end, but meta/episodes has {ends[-1]}. Fix: restore the file"
        )


def _contents(column: Any, path: Path, key: str) -> list[bytes]:
    """Return the image files that a column contains, as bytes."""
    pa = need("pyarrow")
    kind = column.type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0 or not _is_binary(kind.field("bytes").type):
        raise DataError(f"{path}: {key} holds {kind} instead of images. Fix: restore the file")
    contents = column.field("bytes").to_pylist()
    if None in contents:
        raise DataError(f"{path}: {key} refers to images outside of this file, which are not read. Fix: embed them")
    return contents


def _is_binary(kind: Any) -> bool:
    pa = need("pyarrow")
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image(content: bytes, shape: tuple[int, ...], place: str) -> np.ndarray:
    image = decode_image(content, place, shape[2])
    if image.shape != shape:
        raise DataError(
            f"{place} has an image of shape {image.shape}, but meta/info.json has {shape}. Fix: create the data set again"
        )
    return image
