"""Reads LeRobot v3 and v2: `meta/info.json`, the list of episodes, steps in parquet files, cameras there or in mp4 files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from difftori.data._filling import Field
from difftori.data.formats._lerobot_episodes import Episodes, frames_per_second, read_episodes
from difftori.data.formats._lerobot_layout import (
    ACTION,
    BOOKKEEPING,
    IMAGES,
    OBSERVATION,
    parse_feature,
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
    """A LeRobot data set. Keys are the recorded features; `info` is `meta/info.json`."""

    episodes: Episodes
    info: dict[str, Any]

    @property
    def tasks(self) -> dict[str, tuple[int, ...]]:
        """The episodes of each task."""
        return self.episodes.by_task()

    def field(self, key: str) -> Field:
        """Return the rows of a key: numbers and images from the parquet files, videos from the video files."""
        place = f"{self.path}: {key}"
        feature = parse_feature(self.info["features"][key], place)
        if feature.kind == "video":
            return Field(place, feature.shape, self._frames(key, feature.shape[2]))
        blocks = self._numbers if feature.kind == "numbers" else self._images
        return Field(place, feature.shape, blocks(key, feature.shape))

    def _numbers(self, key: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        for path in self.episodes.files:
            for (column,) in read_batches(path, [key], _ROWS):
                yield as_numbers(column, shape, f"{path}: {key}")

    def _images(self, key: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        for path in self.episodes.files:
            for (column,) in read_batches(path, [key], _IMAGES):
                yield np.stack([_image(content, shape, f"{path}: {key}") for content in _contents(column, path, key)])

    def _frames(self, key: str, channels: int) -> Iterator[np.ndarray]:
        tolerance = 0.499 / frames_per_second(self.path, self.info)
        for video, times in self.episodes.clips(key):
            yield from read_frames(video, times, tolerance, channels)


def open_lerobot(path: Path) -> LeRobotSource:
    """Read the metadata and the episodes, and check that the steps match them.

    Raises DataError if they do not, and MissingExtraError without the extra `data`.
    """
    info = _info(path)
    episodes = read_episodes(path, info)
    keys = tuple(key for key in info["features"] if key not in BOOKKEEPING)
    observed = {
        key: key.removeprefix(IMAGES).removeprefix(OBSERVATION)
        for key in keys
        if key.startswith(OBSERVATION) and not _is_text(info["features"][key])
    }
    about = {name: info[name] for name in ("fps", "robot_type") if info.get(name) is not None}
    return LeRobotSource(path, keys, ACTION, plain_names(observed, path), episodes.ends, about, episodes, info)


def _is_text(feature: Any) -> bool:
    """Whether a feature is text, such as an instruction, which no policy here reads."""
    return isinstance(feature, dict) and feature.get("dtype") == "string"


def _info(path: Path) -> dict[str, Any]:
    place = path / "meta" / "info.json"
    info = read_json(place)
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict):
        raise DataError(f"{place}: not the metadata of a LeRobot data set with features. Fix: restore the file")
    return info


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
