"""LeRobot v2.0 and v2.1: a parquet file and a video of each camera for every episode, as the dataset cards on the Hub describe them."""

import json

import pytest

from difftori import cli
from difftori.data.formats import describe_demos, read_demos, write_lerobot
from difftori.errors import DataError
from tests.data.formats.test_lerobot import edit, smooth
from tests.support.demo_files import assert_same, tiny

DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def write(demos, path, *, version="v2.1", chunks=1000, **options):
    """Write version 3 with one episode in each file, and arrange the files as version 2 does."""
    write_lerobot(demos, path, **{"fps": 10, "task": "be small", "file_megabytes": 0} | options)
    lines = []
    for number, length in enumerate(demos.lengths):
        place = {"episode_chunk": number // chunks, "episode_index": number}
        moves = [(f"data/chunk-000/file-{number:03d}.parquet", DATA.format(**place))]
        for folder in (path / "videos").glob("observation.*"):
            there = f"videos/{folder.name}/chunk-000/file-{number:03d}.mp4"
            moves.append((there, VIDEO.format(video_key=folder.name, **place)))
        for old, new in moves:
            (path / new).parent.mkdir(parents=True, exist_ok=True)
            (path / old).rename(path / new)
        lines.append(json.dumps({"episode_index": number, "tasks": ["be small"], "length": length}))
    for file in (path / "meta/episodes").glob("*/*"):
        file.unlink()
    (path / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    edit(path, codebase_version=version, chunks_size=chunks, data_path=DATA, video_path=VIDEO)
    return path


@pytest.mark.parametrize(("version", "chunks"), [("v2.1", 1000), ("v2.0", 2)])
def test_it_is_read_as_version_3_is(tmp_path, version, chunks):
    path = write(tiny(), tmp_path / "d", version=version, chunks=chunks)
    assert (path / f"data/chunk-{2 // chunks:03d}/episode_000002.parquet").exists()
    assert_same(read_demos(path), tiny())
    assert describe_demos(path).lengths == tuple(tiny().lengths)


def test_videos_come_back_frame_by_frame(tmp_path):
    path = write(smooth(), tmp_path / "d", videos=True, chunks=2)
    assert len(list((path / "videos").glob("chunk-00[01]/observation.images.image/episode_*.mp4"))) == 3
    again = read_demos(path)
    assert (again.obs["image"].float() - smooth().obs["image"].float()).abs().max() < 5


def test_a_policy_is_trained_on_it(tmp_path):
    path = write(tiny(), tmp_path / "d")
    short = ["--updates", "2", "--batch-size", "2", "--obs-keys", "state", "--quiet"]
    assert cli.main(["train", "bc", "--demos", str(path), *short, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"episode_index": 1, "length": 9}', "no further episode"),
        ('{"episode_index": 7, "length": 9}', "exactly once, from 0 on"),
        ('{"length": 9}', "no further episode with its length"),
        ("[]", "no further episode"),
        ("{", "no readable JSON"),
    ],
)
def test_a_damaged_list_of_episodes_is_refused(tmp_path, line, words):
    path = write(tiny(), tmp_path / "d")
    with (path / "meta/episodes.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=words):
        read_demos(path)


def test_what_is_missing_or_contradicts_is_named(tmp_path):
    path = write(tiny(), tmp_path / "d")
    edit(path, total_frames=1)
    with pytest.raises(DataError, match="total_frames 1, meta/episodes"):
        read_demos(path)
    edit(path, total_frames=12)
    (path / "data/chunk-000/episode_000001.parquet").unlink()
    with pytest.raises(DataError, match="episode_000001.parquet"):
        read_demos(path)
    edit(path, data_path="data/{episode_index}.parquet")
    with pytest.raises(DataError, match="only 'data/chunk-.*' is read"):
        read_demos(path)
    (path / "meta/episodes.jsonl").unlink()
    edit(path, data_path=DATA)
    with pytest.raises(DataError, match=r"episodes\.jsonl: not readable"):
        read_demos(path)
