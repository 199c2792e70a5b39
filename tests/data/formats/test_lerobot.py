import json
import pickle
import resource
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from difftori.data.formats import describe_demos, read_demos, write_lerobot
from difftori.data.formats._source import plain_names
from difftori.data.formats._video import encode_image
from difftori.data.trajectories import Trajectories
from difftori.errors import DataError
from tests.support.demo_files import ENDS, Canary, assert_same, tiny

STEPS = ENDS[-1]
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.image/chunk-000/file-000.mp4"


def write(demos, path, **options):
    write_lerobot(demos, path, **{"fps": 10, "task": "be small"} | options)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tiny(), tmp_path_factory.mktemp("written") / "d")


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    return write(smooth(), tmp_path_factory.mktemp("filmed") / "d", videos=True)


@pytest.fixture
def path(written, tmp_path):
    return shutil.copytree(written, tmp_path / "d")


@pytest.fixture
def film(filmed, tmp_path):
    return shutil.copytree(filmed, tmp_path / "d")


def smooth():
    """Images that a video keeps well, each of its own brightness."""
    level = np.arange(STEPS) * 20
    image = np.broadcast_to(level[:, None, None, None], (STEPS, 16, 32, 3)).astype(np.uint8)
    return Trajectories.of({"image": image}, np.zeros((STEPS, 1)), ENDS)


def set_column(path, name, column):
    table = pq.read_table(path, partitioning=None)
    kept = table.drop_columns([name]) if name in table.column_names else table
    pq.write_table(kept if column is None else kept.append_column(name, column), path)


def edit(path, **changes):
    info = json.loads((path / "meta/info.json").read_text())
    (path / "meta/info.json").write_text(json.dumps(info | changes))


def edit_feature(path, key, **changes):
    info = json.loads((path / "meta/info.json").read_text())
    info["features"][key] = info["features"].get(key, {}) | changes
    (path / "meta/info.json").write_text(json.dumps(info))


def test_written_and_read_are_equal(written):
    again = read_demos(written)
    assert_same(again, tiny())
    assert again.about == {"fps": 10}
    assert [child.name for child in written.parent.iterdir()] == ["d"]


def test_several_files_and_a_selection(tmp_path):
    path = write(tiny().select([2, 0, 1]), tmp_path / "d", file_megabytes=0, robot_type="arm", fps=12.5)
    assert len(list((path / "data").glob("*/*.parquet"))) == 3
    again = read_demos(path)
    assert_same(again, tiny().select([2, 0, 1]))
    assert again.about == {"fps": 12.5, "robot_type": "arm"}


@pytest.mark.parametrize("megabytes", [0, 100])
@pytest.mark.parametrize("fps", [10, 29.97])
def test_videos_come_back_frame_by_frame(tmp_path, megabytes, fps):
    path = write(smooth().select([1, 2, 0]), tmp_path / "d", videos=True, file_megabytes=megabytes, fps=fps)
    assert len(list((path / "videos").glob("*/*/*.mp4"))) == (3 if megabytes == 0 else 1)
    again, expected = read_demos(path), smooth().select([1, 2, 0])
    assert again.lengths == expected.lengths
    for number in range(3):
        seen, shown = again.episode(number)[0]["image"], expected.episode(number)[0]["image"]
        assert (seen.float() - shown.float()).abs().max() < 5


def test_the_description_is_that_of_version_3(path):
    """LeRobot 0.6.1 reads what stands here, and this package what it writes: tried by hand in both directions."""
    info = json.loads((path / "meta/info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"]) == ("v3.0", 3, STEPS)
    assert info["features"]["observation.cloud"] == {"dtype": "float32", "shape": [5, 3], "names": None}
    assert info["features"]["observation.images.image"]["dtype"] == "image"
    rows = pq.read_table(path / EPISODES, partitioning=None).to_pylist()
    assert [row["dataset_to_index"] for row in rows] == ENDS
    assert rows[0]["tasks"] == ["be small"]
    steps = pq.read_table(path / DATA, partitioning=None)
    assert steps["timestamp"].to_pylist()[4:6] == [0.0, np.float32(0.1)]
    assert steps["index"].to_pylist() == list(range(STEPS))
    stats = json.loads((path / "meta/stats.json").read_text())
    np.testing.assert_allclose(stats["action"]["std"], tiny().actions.std(0, correction=0), rtol=1e-5)
    images = tiny().obs["image"].double() / 255
    np.testing.assert_allclose(np.ravel(stats["observation.images.image"]["mean"]), images.mean((0, 1, 2)), rtol=1e-6)


def test_entries_are_joined_and_renamed(path):
    again = read_demos(path, {"low": ("observation.gripper", "observation.state")}, action="observation.state")
    assert torch.equal(again.obs["low"], torch.cat([tiny().obs["gripper"], tiny().obs["state"]], 1))
    assert torch.equal(again.actions, tiny().obs["state"])


def test_two_keys_with_the_same_short_name_are_called_by_their_whole_keys(path):
    short = {"observation.image": "image", "observation.images.image": "image", "observation.state": "state"}
    named = {"observation_image": "observation.image", "observation_images_image": "observation.images.image"}
    assert plain_names(short, path) == {**named, "state": "observation.state"}
    edit_feature(path, "observation.image", dtype="float32", shape=[3])
    again = read_demos(path, {"image": "observation.images.image"})
    assert torch.equal(again.obs["image"], tiny().obs["image"])


def test_keys_that_no_name_separates_are_refused(tmp_path):
    with pytest.raises(DataError, match="'a.b' and 'a_b' would both be called 'a_b'. Fix: rename"):
        plain_names({"a.b": "x", "a_b": "x"}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebase_version": "v1.6"}, "codebase_version v1.6, but v3 and v2 are read. Fix: convert"),
        ({"codebase_version": None}, "codebase_version None"),
        ({"features": None}, "not the metadata of a LeRobot data set"),
        ({"data_path": "../{chunk_index}"}, "data_path '../{chunk_index}', but only"),
        ({"total_frames": 13}, "total_frames 13, meta/episodes 12"),
        ({"total_episodes": 2}, "total_episodes 2, meta/episodes 3"),
    ],
)
def test_a_wrong_description_is_refused(path, changes, words):
    edit(path, **changes)
    with pytest.raises(DataError, match=words):
        read_demos(path)


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        ("observation.state", {"shape": [4]}, r"steps of shape \(3,\), but meta/info.json has \(4,\)"),
        ("observation.state", {"shape": [10**30]}, r"steps of shape \(3,\), but meta/info.json has"),
        ("observation.state", {"shape": 3}, "not a feature with dtype and shape"),
        ("observation.state", {"dtype": "image", "shape": [8, 6, 3]}, "instead of images"),
        ("observation.images.image", {"dtype": "float32"}, "holds struct<.*only plain numbers"),
        ("observation.images.image", {"shape": [9, 6, 3]}, r"image of shape \(8, 6, 3\), but meta/info.json has"),
        ("observation.images.image", {"shape": [8, 6, 1]}, r"image of shape \(8, 6, 3\), but meta/info.json has"),
        ("observation.images.image", {"shape": [8, 6, 2]}, "only images with three channels or one"),
        ("observation.images.image", {"dtype": "video"}, "no column 'videos/observation.images.image/chunk_index'"),
        ("observation.depth", {"dtype": "float32", "shape": [3]}, "no column 'observation.depth'"),
    ],
)
def test_a_wrong_feature_is_refused(path, key, changes, words):
    edit_feature(path, key, **changes)
    with pytest.raises(DataError, match=words):
        read_demos(path)


def test_text_is_read_only_if_it_is_named_and_then_refused(path):
    edit_feature(path, "observation.state", dtype="string")
    assert "state" not in read_demos(path).obs
    assert "observation.state" in {key.key for key in describe_demos(path).keys}
    with pytest.raises(DataError, match="is of type 'string'; only numbers"):
        read_demos(path, ["observation.state"])


def test_channels_may_come_first_in_the_description(path):
    edit_feature(path, "observation.images.image", shape=[3, 8, 6], names=["channels", "height", "width"])
    assert_same(read_demos(path), tiny())
    edit_feature(path, "observation.images.image", shape=[3, 8, 6], names=None)
    assert_same(read_demos(path), tiny())


def lists(rows):
    return pa.array(rows, pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (lists([[0.0] * 3] * 11 + [[0.0] * 2]), r"lists of the lengths \[2, 3\]; all must have one length"),
        (lists([[0.0] * 3] * 11 + [None]), "lists of the lengths"),
        (lists([[0.0] * 3] * 11 + [[0.0, 1.0, None]]), "lacks 1 of 36 values"),
        (
            lists([[0.0] * 3] * 11 + [[0.0, 1.0, np.nan]]),
            "state: holds nan at step 11 .episode 2, its step 4., number 2",
        ),
        (lists([[0.0] * 4] * 12), r"has steps of shape \(4,\)"),
        (pa.array([0.0] * 12), r"has steps of shape \(\)"),
        (pa.array(["x"] * 12), "holds string; only plain numbers"),
        (pa.array([None] * 12), "holds int32|holds null|lacks"),
        (None, "no column 'observation.state'"),
    ],
)
def test_a_wrong_column_is_refused(path, column, words):
    set_column(path / DATA, "observation.state", column)
    with pytest.raises(DataError, match=words) as caught:
        read_demos(path)
    assert "observation.state" in str(caught.value)


def test_pickles_are_refused_and_not_run(path, tmp_path):
    canary = tmp_path / "canary"
    content = pickle.dumps(Canary(canary))
    for column in (pa.array([content] * STEPS), pa.array([[content] * 3] * STEPS)):
        set_column(path / DATA, "observation.state", column)
        with pytest.raises(DataError, match="holds binary; only plain numbers are read, pickled objects never"):
            read_demos(path)
    images = pa.array([{"bytes": content, "path": None}] * STEPS)
    set_column(path / DATA, "observation.images.image", images)
    with pytest.raises(DataError, match="which is neither PNG nor JPEG"):
        read_demos(path, {"image": "observation.images.image"})
    assert not canary.exists()


def test_a_pickled_arrow_type_is_not_loaded(path, tmp_path):
    canary = tmp_path / "canary"
    table = pq.read_table(path / DATA, partitioning=None)
    position = table.column_names.index("observation.state")
    names = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Canary(canary)),
    }
    marked = table.schema.field(position).with_metadata(names)
    pq.write_table(table.set_column(position, marked, table.column(position)), path / DATA)
    assert_same(read_demos(path), tiny())
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("dataset_to_index", [4, 3, 12], "episode 1 begins at step 4 and ends at 3"),
        ("length", [4, 4, 4], "length, dataset_from_index and dataset_to_index contradict"),
        ("episode_index", [0, 0, 1], "does not list each episode exactly once, from 0 on"),
        ("data/file_index", [0, 0, 1], "file-001.parquet: no readable parquet"),
        ("data/file_index", [-1, -1, -1], "no readable parquet"),
        ("dataset_to_index", [4, 7, 2**60], "contradict"),
        ("data/file_index", ["a", "b", "c"], "holds string; only plain numbers"),
    ],
)
def test_wrong_episodes_are_refused(path, name, column, words):
    set_column(path / EPISODES, name, pa.array(column))
    with pytest.raises(DataError, match=words):
        read_demos(path)


def test_episodes_may_be_listed_in_any_order(path):
    table = pq.read_table(path / EPISODES, partitioning=None)
    pq.write_table(table.take([2, 0, 1]), path / EPISODES)
    assert_same(read_demos(path), tiny())


def test_steps_of_other_episodes_are_noticed(path):
    set_column(path / DATA, "episode_index", pa.array([0] * 5 + [1] * 2 + [2] * 5))
    with pytest.raises(DataError, match="its steps are not those of the episodes"):
        read_demos(path)


def test_lost_steps_are_noticed(path):
    table = pq.read_table(path / DATA, partitioning=None)
    pq.write_table(table.slice(0, 10), path / DATA)
    with pytest.raises(DataError, match="10 steps up to its end, but meta/episodes has 12"):
        read_demos(path)


@pytest.mark.parametrize("name", [DATA, EPISODES, "meta/info.json"])
@pytest.mark.parametrize("left", [0, 3, 0.5, -1])
def test_every_truncation_is_an_error(path, name, left):
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(DataError, match=name):
        read_demos(path)


@pytest.mark.parametrize("name", [DATA, EPISODES, VIDEO])
def test_a_missing_file_is_named(film, name):
    (film / name).unlink()
    with pytest.raises(DataError, match="file-000|no meta/episodes"):
        read_demos(film)


@pytest.mark.parametrize("left", [0, 100, 0.5, 0.85])
def test_a_cut_video_is_an_error(film, left):
    content = (film / VIDEO).read_bytes()
    (film / VIDEO).write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(DataError, match=r"file-000.mp4: no (readable video|frame at)"):
        read_demos(film)


def test_a_video_that_is_too_short_is_an_error(film, tmp_path):
    short = write(smooth().select([0, 1]), tmp_path / "short", videos=True)
    shutil.copy(short / VIDEO, film / VIDEO)
    with pytest.raises(DataError, match="no frame at 0.700 s, number 8 of 12"):
        read_demos(film)


@pytest.mark.parametrize(
    ("begins", "words"), [([0.0, np.nan, 0.7], "holds NaN or Inf"), ([0.0, 0.4, 9.0], "no frame at 9.000 s, number 8")]
)
def test_wrong_times_are_refused(film, begins, words):
    set_column(film / EPISODES, "videos/observation.images.image/from_timestamp", pa.array(begins))
    with pytest.raises(DataError, match=words):
        read_demos(film)


def test_a_playlist_in_place_of_a_video_opens_nothing(film, tmp_path):
    shutil.move(film / VIDEO, tmp_path / "real.mp4")
    (film / VIDEO).write_text(f"ffconcat version 1.0\nfile {tmp_path / 'real.mp4'}\n")
    with pytest.raises(DataError, match="no readable video"):
        read_demos(film)


def test_a_camera_cannot_lead_out_of_the_folder(film):
    key = "observation.images.image"
    table = pq.read_table(film / EPISODES, partitioning=None)
    names = [name.replace(key, "observation.../../x") for name in table.column_names]
    pq.write_table(table.rename_columns(names), film / EPISODES)
    edit_feature(film, "observation.../../x", dtype="video", shape=[16, 32, 3])
    with pytest.raises(DataError, match="cannot name a camera"):
        read_demos(film, {"x": "observation.../../x"})


def test_images_outside_of_the_file_are_not_read(path):
    outside = pa.array(
        [{"bytes": None, "path": "/etc/passwd"}] * STEPS, pa.struct({"bytes": pa.binary(), "path": "str"})
    )
    set_column(path / DATA, "observation.images.image", outside)
    with pytest.raises(DataError, match="refers to images outside of this file"):
        read_demos(path)


def test_a_cut_image_is_an_error(path):
    table = pq.read_table(path / DATA, partitioning=None)
    rows = table.column("observation.images.image").to_pylist()
    rows[3]["bytes"] = rows[3]["bytes"][:60]
    set_column(path / DATA, "observation.images.image", pa.array(rows))
    with pytest.raises(DataError, match="observation.images.image cannot be decoded"):
        read_demos(path)


@pytest.mark.parametrize(
    ("entry", "options", "words"),
    [
        (np.zeros((STEPS, 8, 6, 4), np.uint8), {}, "observation.x has steps of shape .8, 6, 4.; only images with"),
        (np.zeros((STEPS, 7, 6, 3), np.uint8), {"videos": True}, "needs an even height and width"),
        (np.zeros((STEPS, 2)), {"fps": 0}, "fps is 0"),
    ],
)
def test_what_this_format_cannot_keep_is_refused(tmp_path, entry, options, words):
    demos = Trajectories.of({"x": entry}, np.zeros((STEPS, 1)), ENDS)
    with pytest.raises(DataError, match=words):
        write(demos, tmp_path / "d", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_depth_images_have_one_channel(tmp_path, dtype):
    """Grey images of 8 bits are images, and of 16 bits numbers; LeRobot gives their shape with or without the channel."""
    depth = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (STEPS, 8, 6, 1), dtype=dtype)
    path = write(Trajectories.of({"depth": depth.astype(np.uint8)}, np.zeros((STEPS, 1)), ENDS), tmp_path / "d")
    contents = [{"bytes": encode_image(image), "path": None} for image in depth]
    set_column(path / DATA, "observation.images.depth", pa.array(contents))
    for shape in ([8, 6, 1], [8, 6]):
        edit_feature(path, "observation.images.depth", shape=shape, names=None)
        read = read_demos(path).obs["depth"]
        assert read.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
        assert torch.equal(read.double(), torch.from_numpy(depth.astype(np.float64)))


def test_an_existing_place_is_kept(path):
    with pytest.raises(DataError, match="already exists"):
        write(tiny(1), path)
    assert_same(read_demos(path), tiny())


@pytest.mark.parametrize("videos", [True, False])
def test_a_full_disk_leaves_nothing(tmp_path, videos):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(DataError, match="free space"):
            write(tiny() if not videos else smooth(), tmp_path / "d", videos=videos)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_of_a_number_is_noticed(path):
    content = bytearray((path / DATA).read_bytes())
    content[content.index(tiny().obs["state"][5].numpy().tobytes()[:4])] ^= 1
    (path / DATA).write_bytes(content)
    with pytest.raises(DataError, match="no readable parquet .*CRC"):
        read_demos(path)
