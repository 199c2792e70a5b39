"""Writes data sets in the LeRobot v3 format."""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from difftori.data.formats._lerobot_layout import (
    ACTION,
    BOOKKEEPING,
    DATA_PATH,
    FILES_PER_CHUNK,
    IMAGES,
    OBSERVATION,
    VERSION,
    VIDEO_PATH,
    data_file,
    episodes_file,
    video_file,
)
from difftori.data.formats._source import need
from difftori.data.formats._video import VideoWriter, encode_image
from difftori.data.formats._writing import whole_folder
from difftori.data.normalize import measure
from difftori.data.trajectories import Trajectories
from difftori.errors import DataError

Row: TypeAlias = dict[str, Any]


def write_lerobot(
    demos: Trajectories,
    path: Path | str,
    *,
    fps: int | float,
    task: str,
    robot_type: str | None = None,
    videos: bool = False,
    crf: int = 18,
    file_megabytes: int = 100,
) -> None:
    """Write the episodes of this set as a LeRobot v3 data set, atomically.

    `state` becomes `observation.state`, and so on. Images (T height width C), with three channels or one, become
    `observation.images.…`: lossless PNG files, embedded. With `videos`, colour images become lossy H.264 videos of quality
    `crf` (lower is better; default: 18). `fps` is the number of steps per second. `task` describes the task in words. A new
    file is started after `file_megabytes` MB (default: 100). Raises DataError if `path` exists, cannot be written, or an
    entry cannot be stored in this format; and MissingExtraError without the extra `data`.
    """
    path = Path(path)
    keys = {_key(name, values): values for name, values in demos.obs.items()} | {ACTION: demos.actions}
    moving = [key for key, values in keys.items() if videos and _is_image(values) and values.shape[-1] == 3]
    _check(keys, moving, path, fps)
    size = file_megabytes * 2**20
    with whole_folder(path) as root:
        still = {key: values for key, values in keys.items() if key not in moving}
        episodes = _write_steps(root, demos, still, fps, size)
        for key in moving:
            places = _write_videos(root, demos, key, keys[key], fps, crf, size)
            episodes = [row | place for row, place in zip(episodes, places, strict=True)]
        _write_json(root / "meta" / "info.json", _info(demos, keys, moving, fps, robot_type))
        _write_json(root / "meta" / "stats.json", {key: _stats(demos, values) for key, values in keys.items()})
        _write_episodes(root, episodes, task)
        _write_tasks(root, task)


def _key(name: str, values: Tensor) -> str:
    return (IMAGES if _is_image(values) else OBSERVATION) + name


def _is_image(values: Tensor) -> bool:
    return values.dtype == torch.uint8 and values.ndim == 4 and values.shape[-1] in (1, 3)


def _check(keys: Mapping[str, Tensor], moving: Sequence[str], path: Path, fps: int | float) -> None:
    for key, values in keys.items():
        shape = tuple(values.shape[1:])
        if values.dtype == torch.uint8 and not _is_image(values):
            raise DataError(
                f"{path}: {key} has steps of shape {shape}; only images with three channels or one can be stored. Fix: omit this entry"
            )
        if key in moving and (shape[0] % 2 or shape[1] % 2):
            raise DataError(
                f"{path}: {key} has images of {shape[:2]}; a video needs an even height and width. Fix: videos=False"
            )
    if not 0 < fps < 1e6:
        raise DataError(f"{path}: fps is {fps}; it must be the number of steps per second, above 0")


def _write_steps(
    root: Path, demos: Trajectories, keys: Mapping[str, Tensor], fps: int | float, limit: int
) -> list[Row]:
    """Write the parquet files, one row group per episode. Return the metadata of each episode."""
    parquet = need("pyarrow.parquet")
    rows: list[Row] = []
    stops, number, path, writer = np.cumsum(demos.lengths), -1, root, None
    try:
        for episode, (length, stop) in enumerate(zip(demos.lengths, stops.tolist(), strict=True)):
            table = _table(demos, keys, episode, stop - length, fps)
            if writer is None or path.stat().st_size >= limit:
                if writer is not None:
                    writer.close()
                number += 1
                path = data_file(root, *divmod(number, FILES_PER_CHUNK))
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = parquet.ParquetWriter(path, table.schema, write_page_checksum=True)
            writer.write_table(table)
            chunk, file = divmod(number, FILES_PER_CHUNK)
            place = {"data/chunk_index": chunk, "data/file_index": file}
            span = {"dataset_from_index": stop - length, "dataset_to_index": stop}
            rows.append({"episode_index": episode, "length": length, **place, **span})
    finally:
        if writer is not None:
            writer.close()
    return rows


def _table(demos: Trajectories, keys: Mapping[str, Tensor], episode: int, first: int, fps: int | float) -> Any:
    """Return the steps of one episode as an Arrow table."""
    pa = need("pyarrow")
    start, stop = demos.spans[episode].tolist()
    steps = np.arange(stop - start)
    columns = {key: _column(values[start:stop].cpu().numpy()) for key, values in keys.items()}
    bookkeeping = {
        "timestamp": steps / fps,
        "frame_index": steps,
        "episode_index": np.full(len(steps), episode),
        "index": first + steps,
        "task_index": np.zeros(len(steps)),
    }
    for name, kind in BOOKKEEPING.items():
        columns[name] = pa.array(bookkeeping[name].astype(kind))
    return pa.table(columns)


def _column(values: np.ndarray) -> Any:
    """Convert values (L …) to an Arrow column: numbers as (nested) lists or scalars, images as embedded PNG files."""
    pa = need("pyarrow")
    if values.dtype == np.uint8:
        images = [{"bytes": encode_image(image), "path": None} for image in values]
        return pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.shape[1:] == (1,):
        return column
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(column, values.shape[1])
    for size in reversed(values.shape[1:]):
        column = pa.ListArray.from_arrays(np.arange(0, len(column) + 1, size, dtype=np.int32), column)
    return column


def _write_videos(
    root: Path, demos: Trajectories, key: str, values: Tensor, fps: int | float, crf: int, limit: int
) -> list[Row]:
    """Write the videos of one camera, episode by episode. Return the location of each episode in them."""
    rows: list[Row] = []
    rate = Fraction(fps).limit_denominator(1001)
    height, width = values.shape[1:3]
    number, path, video = -1, root, None
    try:
        for start, stop in demos.spans.tolist():
            if video is None or path.stat().st_size >= limit:
                if video is not None:
                    video.close()
                number += 1
                path = video_file(root, key, *divmod(number, FILES_PER_CHUNK))
                video = VideoWriter(path, rate, height, width, crf)
            begin = video.frames
            for block in values[start:stop].split(64):
                video.append(block.cpu().numpy())
            chunk, file = divmod(number, FILES_PER_CHUNK)
            place = {"chunk_index": chunk, "file_index": file}
            times = {"from_timestamp": float(begin / rate), "to_timestamp": float(video.frames / rate)}
            rows.append({f"videos/{key}/{name}": value for name, value in (place | times).items()})
    finally:
        if video is not None:
            video.close()
    return rows


def _info(
    demos: Trajectories, keys: Mapping[str, Tensor], moving: Sequence[str], fps: int | float, robot_type: str | None
) -> Row:
    features: Row = {}
    for key, values in keys.items():
        shape = list(values.shape[1:])
        if _is_image(values):
            kind = "video" if key in moving else "image"
            features[key] = {"dtype": kind, "shape": shape, "names": ["height", "width", "channels"]}
        else:
            features[key] = {"dtype": "float32", "shape": shape, "names": None}
    features |= {name: {"dtype": kind, "shape": [1], "names": None} for name, kind in BOOKKEEPING.items()}
    return {
        "codebase_version": VERSION,
        "robot_type": robot_type,
        "total_episodes": len(demos),
        "total_frames": sum(demos.lengths),
        "total_tasks": 1,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": int(fps) if float(fps).is_integer() else fps,
        "splits": {"train": f"0:{len(demos)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if moving else None,
        "features": features,
    }


def _stats(demos: Trajectories, values: Tensor) -> Row:
    """Return minimum, maximum, mean, deviation and count of each number of a step, or of each channel of images in [0, 1] (C 1 1)."""
    blocks = demos.blocks(values)
    shape = (values.shape[-1], 1, 1) if _is_image(values) else tuple(values.shape[1:])
    moments = measure(blocks if _is_image(values) else (block.flatten(1) for block in blocks))
    scale = 255.0 if _is_image(values) else 1.0
    named = {"min": moments.low, "max": moments.high, "mean": moments.mean, "std": moments.std}
    stats: Row = {name: (np.array(value) / scale).reshape(shape).tolist() for name, value in named.items()}
    return stats | {"count": [sum(demos.lengths)]}


def _write_episodes(root: Path, rows: Sequence[Row], task: str) -> None:
    pa, parquet = need("pyarrow"), need("pyarrow.parquet")
    known = {"tasks": [task], "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    path = episodes_file(root, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist([row | known for row in rows]), path, write_page_checksum=True)


def _write_tasks(root: Path, task: str) -> None:
    """Write the table of tasks. LeRobot reads it with pandas; the metadata marks the column `task` as its index."""
    pa, parquet = need("pyarrow"), need("pyarrow.parquet")

    def column(name: str, kind: str, numpy_kind: str) -> Row:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array([0], pa.int64()), "task": pa.array([task], pa.string())})
    parquet.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), root / "meta" / "tasks.parquet")


def _write_json(path: Path, content: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")
