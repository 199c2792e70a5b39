"""Paths of a LeRobot data set, and the features of its `meta/info.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from difftori.errors import DataError

VERSION = "v3.0"
OBSERVATION = "observation."
IMAGES = "observation.images."
ACTION = "action"
FILES_PER_CHUNK = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
# Version 2 has a file for every episode.
EPISODES_V2 = "meta/episodes.jsonl"
DATA_PATH_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH_V2 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
# Columns that LeRobot adds to the recorded ones: name and Arrow type.
BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


@final
@dataclass(frozen=True)
class Feature:
    """A key of a step: its `kind`, and the `shape` of one step, (height width C) for images and videos, C 3 or 1."""

    kind: Literal["numbers", "image", "video"]
    shape: tuple[int, ...]


def data_file(root: Path, chunk: int, file: int) -> Path:
    """Return the path of a file of steps."""
    return root / DATA_PATH.format(chunk_index=chunk, file_index=file)


def episodes_file(root: Path, chunk: int, file: int) -> Path:
    """Return the path of a file with one row per episode."""
    return root / "meta" / "episodes" / f"chunk-{chunk:03d}" / f"file-{file:03d}.parquet"


def video_file(root: Path, key: str, chunk: int, file: int) -> Path:
    """Return the path of a video of one camera. Raises DataError if the key could lead out of the folder."""
    return root / VIDEO_PATH.format(video_key=_checked_camera(root, key), chunk_index=chunk, file_index=file)


def data_file_v2(root: Path, chunk: int, episode: int) -> Path:
    """Return the path of the steps of an episode in version 2."""
    return root / DATA_PATH_V2.format(episode_chunk=chunk, episode_index=episode)


def video_file_v2(root: Path, key: str, chunk: int, episode: int) -> Path:
    """Return the path of an episode's video of one camera in version 2. Raises DataError as `video_file` does."""
    key = _checked_camera(root, key)
    return root / VIDEO_PATH_V2.format(video_key=key, episode_chunk=chunk, episode_index=episode)


def _checked_camera(root: Path, key: str) -> str:
    if "/" in key or "\\" in key or key in ("", ".", ".."):
        raise DataError(
            f"{root}: {key!r} cannot name a camera, because names have no slash. Fix: restore meta/info.json"
        )
    return key


def parse_feature(value: Any, place: str) -> Feature:
    """Parse a feature of `meta/info.json`. Raises DataError if it is neither numeric nor an image of three channels or one."""
    try:
        dtype, shape = value["dtype"], tuple(int(size) for size in value["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place} is not a feature with dtype and shape ({error}). Fix: restore the file") from error
    if dtype in ("image", "video"):
        names = value.get("names")
        first = names[0] if isinstance(names, list) and names else None
        leads = str(first).startswith("channel") if first is not None else shape[:1] in ((3,), (1,))
        image = (*shape[1:], *shape[:1]) if leads else shape if len(shape) == 3 else (*shape, 1)
        if len(image) != 3 or image[2] not in (1, 3):
            raise DataError(
                f"{place} has the shape {shape}; only images with three channels or one are read. Fix: omit this key"
            )
        return Feature(dtype, image)
    if not isinstance(dtype, str) or not dtype.startswith(("float", "int", "uint", "bool")):
        raise DataError(f"{place} is of type {dtype!r}; only numbers, images and videos are read. Fix: omit this key")
    return Feature("numbers", shape)
