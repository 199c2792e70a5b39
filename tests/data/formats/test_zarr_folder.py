import json
import pickle
import resource
import shutil

import numcodecs
import numpy as np
import pytest
import torch
import zarr

from difftori.data.formats import describe_demos, read_demos, write_zarr
from difftori.errors import DataError
from tests.support.demo_files import ENDS, Canary, assert_same, tiny

STEPS = ENDS[-1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "d.zarr"
    write_zarr(tiny(), path)
    return path


@pytest.fixture
def path(written, tmp_path):
    return shutil.copytree(written, tmp_path / "d.zarr")


def replace(path, key, values, **options):
    shutil.rmtree(path / key)
    options = {"zarr_format": 2, "chunks": (5, *values.shape[1:])} | options
    array = zarr.create_array(path / key, shape=values.shape, dtype=values.dtype, **options)
    array[...] = values


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_written_and_read_are_equal(written):
    again = read_demos(written)
    assert_same(again, tiny())
    assert again.about == {"env": "tiny", "seed": 0}
    assert [child.name for child in written.parent.iterdir()] == ["d.zarr"]


def test_actions_are_no_observations(path):
    values = tiny().actions.numpy()
    shutil.move(path / "data" / "action", path / "data" / "actions")
    zarr.create_array(path / "data" / "action_delta", shape=values.shape, dtype=values.dtype, zarr_format=2)[...] = (
        values
    )
    for action in (None, "action_delta", "state"):
        assert set(read_demos(path, action=action).obs) == set(tiny().obs) - {action}
    assert {key.name for key in describe_demos(path).keys} == {*tiny().obs, "action", None}
    assert set(read_demos(path, ["action_delta"]).obs) == {"action_delta"}


def test_a_selection_is_written_alone(tmp_path):
    write_zarr(tiny().select([2, 0]), tmp_path / "d.zarr", about={"part": 2})
    again = read_demos(tmp_path / "d.zarr")
    assert_same(again, tiny().select([2, 0]))
    assert again.about == {"part": 2}


def test_it_is_the_layout_of_diffusion_policy(path):
    root = zarr.open_group(path, mode="r", zarr_format=2)
    assert root["meta/episode_ends"][...].tolist() == ENDS
    assert root["data/action"].shape == (STEPS, 2)
    assert root["data/image"].dtype == np.uint8
    assert root["data/cloud"].compressors[0].cname == "zstd"


@pytest.mark.parametrize("compressor", [None, numcodecs.Zlib(), numcodecs.LZ4(), numcodecs.GZip(), numcodecs.Zstd()])
@pytest.mark.parametrize("dtype", [">f8", "<f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_other_ways_of_storing_numbers_are_read(path, compressor, dtype, order):
    values = tiny().obs["cloud"].numpy()
    replace(path, "data/cloud", values.astype(dtype), compressors=compressor, order=order, chunks=(5, 2, 3))
    assert torch.equal(read_demos(path, {"cloud": "cloud"}).obs["cloud"], tiny().obs["cloud"])


def test_format_3_is_read(tmp_path):
    root = zarr.create_group(tmp_path / "d.zarr", attributes={"env": "tiny"})
    demos = tiny()
    for name, values in {**demos.obs, "action": demos.actions}.items():
        root.create_array(f"data/{name}", data=values.numpy(), chunks=(5, *values.shape[1:]))
    root.create_array("meta/episode_ends", data=np.array(ENDS))
    again = read_demos(tmp_path / "d.zarr")
    assert_same(again, demos)
    assert again.about == {"env": "tiny"}


def test_images_kept_as_floats_become_bytes_and_counts_become_columns(path):
    replace(path, "data/image", tiny().obs["image"].numpy().astype(np.float32))
    replace(path, "data/gripper", np.arange(STEPS))
    again = read_demos(path)
    assert torch.equal(again.obs["image"], tiny().obs["image"])
    assert again.obs["gripper"].flatten().tolist() == list(range(STEPS))


def test_entries_choose_rename_and_join(path):
    again = read_demos(path, {"both": ("gripper", "state"), "pixels": "image"}, action="gripper")
    assert torch.equal(again.obs["both"], torch.cat([tiny().obs["gripper"], tiny().obs["state"]], 1))
    assert torch.equal(again.obs["pixels"], tiny().obs["image"])
    assert torch.equal(again.actions, tiny().obs["gripper"])
    assert set(again.obs) == {"both", "pixels"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"entries": {"x": "depth"}},
            r"x is to be read from 'depth', which does not exist; there are action \(2\), cloud \(5, 3\).*--obs-keys x=KEY",
        ),
        ({"entries": {}}, "no observations are chosen"),
        ({"entries": {"x": ()}}, "x is to be read from ''"),
        (
            {"entries": {"x": ("state", "image")}},
            r"data/image: steps of shape \(8, 6, 3\); only vectors can be concatenated",
        ),
        ({"entries": {"a b": "state"}}, "'a b' cannot name an observation"),
        ({"action": "torque"}, "the actions are to be read from 'torque', which does not exist.*--action-key KEY"),
        ({"entries": ["x=depth"]}, "x is to be read from 'depth'"),
        ({"entries": ["state", "state=cloud"]}, "'state' is given twice"),
        ({"episodes": ["1:4"]}, "there are no episodes 1:4; the data set has 3, from 0 to 2"),
        ({"episodes": ["first"]}, "'first' names no episodes"),
        ({"action": "cloud"}, r"an action has the shape \(5, 3\); actions must be"),
        ({"subset": "train"}, "subset is 'train', but the data set has neither"),
        ({"storage": "mmap"}, "set folder if storage is 'mmap'"),
    ],
)
def test_a_wrong_wish_is_named(path, options, words):
    with pytest.raises(DataError, match=words):
        read_demos(path, **options)


def test_a_mapped_set_is_the_same_and_leaves_no_file(path, tmp_path):
    folder = tmp_path / "map"
    again = read_demos(path, storage="mmap", folder=folder)
    assert_same(again, tiny())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: (path / "data/state/0.0").unlink(), "data/state/0.0: this chunk cannot be read .*fill value"),
        (lambda path: (path / "data/state/0.0").write_bytes(b""), "data/state/0.0: this chunk has 0 bytes, less than"),
        (
            lambda path: (path / "data/state/0.0").write_bytes(bytes(99)),
            "data/state/0.0: this chunk has 99 bytes for 144",
        ),
        (lambda path: (path / "data/state/.zarray").unlink(), "read from 'state', which does not exist"),
        (lambda path: (path / "data/state/.zarray").write_text("{"), "state/.zarray: no readable JSON"),
        (lambda path: (path / "data/state/.zarray").write_bytes(b"\xff\xfe"), "state/.zarray: no readable JSON"),
        (lambda path: (path / "data/state/.zarray").write_text("[" * 99999), "state/.zarray: no readable JSON"),
        (lambda path: (path / "data/state/.zarray").write_text("[]"), "not the description of a zarr array"),
        (lambda path: (path / "data/state/.zarray").write_text("{}"), "not the description of a zarr array"),
        (lambda path: edit(path / "data/state/.zarray", shape=[STEPS, -3]), "is invalid. Fix: restore"),
        (lambda path: edit(path / "data/state/.zarray", chunks=[0, 3]), "is invalid. Fix: restore"),
        (lambda path: edit(path / "data/state/.zarray", chunks=[5]), "is invalid. Fix: restore"),
        (lambda path: edit(path / "data/state/.zarray", shape="many"), "not the description of a zarr array"),
        (lambda path: edit(path / "data/state/.zarray", dimension_separator="/../"), "'/../' is invalid"),
        (lambda path: edit(path / "data/state/.zarray", shape=[STEPS, 3, 10**12], chunks=[12, 3, 10**12]), "state"),
        (lambda path: edit(path / "data/state/.zarray", shape=[]), "is invalid. Fix: restore"),
        (lambda path: shutil.rmtree(path / "data"), "no arrays in data/"),
        (lambda path: (path / "meta/episode_ends/.zarray").unlink(), "not a zarr array"),
        (lambda path: (path / "meta/episode_ends/0").unlink(), "episode_ends/0: this chunk cannot be read"),
        (lambda path: (path / ".zattrs").write_text("{"), "zattrs: no readable JSON"),
    ],
)
def test_a_damaged_folder_is_a_typed_error(path, harm, words):
    harm(path)
    with pytest.raises(DataError, match=words) as caught:
        read_demos(path, {"state": "state"})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compressor", ["blosc", "zlib", "zstd", None])
@pytest.mark.parametrize("left", [0, 1, 15, 40, -1])
def test_every_cut_chunk_is_noticed(path, compressor, left):
    if compressor != "blosc":
        options = {"zlib": numcodecs.Zlib(), "zstd": numcodecs.Zstd(), None: None}
        replace(path, "data/state", tiny().obs["state"].numpy(), compressors=options[compressor])
    chunk = path / "data/state/0.0"
    chunk.write_bytes(chunk.read_bytes()[:left])
    with pytest.raises(DataError, match="data/state"):
        read_demos(path, {"state": "state"})


@pytest.mark.parametrize("size", [2**31 - 1, 0, 143])
def test_a_chunk_that_claims_another_size_is_not_unpacked(path, size):
    chunk = path / "data/state/0.0"
    content = bytearray(chunk.read_bytes())
    content[4:8] = size.to_bytes(4, "little")
    chunk.write_bytes(content)
    with pytest.raises(DataError, match=f"header has {len(content)} for {size}"):
        read_demos(path, {"state": "state"})


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (np.array([4, 3, 12]), "episode_ends: episode 1 begins at step 4 and ends at 3; ends must increase"),
        (np.array([4, 4, 12]), "ends must increase"),
        (np.array([0, 12]), "ends must increase"),
        (np.array([-1, 12]), "ends must increase"),
        (np.array([4.0, 12.0]), "ends are float64"),
        (np.array([[4, 12]]), r"of shape \(1, 2\)"),
        (np.array([4, 11]), r"data/\w+ has the shape .* ends at 11; one of them is truncated"),
        (np.array([4, 13]), "ends at 13"),
        (np.array([2**64 - 1], np.uint64), "ends must increase"),
    ],
)
def test_wrong_ends_are_refused(path, ends, words):
    replace(path, "meta/episode_ends", ends, chunks=ends.shape)
    with pytest.raises(DataError, match=words):
        read_demos(path, {"state": "state"})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named_with_its_place(path, value):
    state = tiny().obs["state"].numpy().copy()
    state[8, 1] = value
    replace(path, "data/state", state)
    with pytest.raises(
        DataError,
        match=rf"data/state: holds {value} at step 8 \(episode 2, its step 1\), number 1; values must be finite. Fix: drop",
    ):
        read_demos(path, {"state": "state"})


def malicious(path, canary, how):
    """Make `data/state` run code where it is unpickled."""
    payload = np.array([Canary(canary)] * STEPS, dtype=object)
    folder = path / "data/state"
    shutil.rmtree(folder)
    folder.mkdir()
    pickled = numcodecs.Pickle().encode(payload)
    meta = {"zarr_format": 2, "shape": [STEPS], "chunks": [STEPS], "order": "C", "fill_value": None}
    meta |= {"dtype": "|O", "compressor": None, "filters": [{"id": "pickle", "protocol": 5}]}
    if how == "compressor":
        meta |= {"dtype": "<f4", "filters": None, "compressor": {"id": "pickle", "protocol": 5}}
    if how == "filter of numbers":
        meta |= {"dtype": "<f4"}
    if how == "format 3":
        meta = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [STEPS],
            "data_type": "float32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [STEPS]}},
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "fill_value": 0.0,
            "codecs": [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {}}],
            "attributes": {},
        }
    (folder / ("zarr.json" if how == "format 3" else ".zarray")).write_text(json.dumps(meta))
    (folder / "0").write_bytes(pickled)
    if how == "consolidated":  # zarr would believe this, and not the harmless description beside the numbers
        liar = {
            "metadata": {"data/state/.zarray": meta, ".zgroup": {"zarr_format": 2}, "data/.zgroup": {"zarr_format": 2}}
        }
        (path / ".zmetadata").write_text(json.dumps(liar | {"zarr_consolidated_format": 1}))
        replace(path, "data/state", tiny().obs["state"].numpy())


@pytest.mark.parametrize("how", ["object", "compressor", "filter of numbers", "format 3"])
def test_pickles_are_refused_before_a_codec_is_made(path, tmp_path, how, monkeypatch):
    canary = tmp_path / "canary"
    malicious(path, canary, how)
    made = []
    monkeypatch.setattr(numcodecs.Pickle, "__init__", lambda *_, **__: made.append(1))
    with pytest.raises(DataError, match=r"data/state/\.?zar.*pickled objects never"):
        read_demos(path)
    assert not canary.exists()
    assert made == []
    assert set(read_demos(path, {"image": "image"}).obs) == {"image"}  # what is not asked for does not matter


def test_the_canary_would_sing(path, tmp_path):
    malicious(path, tmp_path / "canary", "object")
    pickle.loads((path / "data/state/0").read_bytes())
    assert (tmp_path / "canary").exists()


def test_consolidated_descriptions_are_not_believed(path, tmp_path):
    malicious(path, tmp_path / "canary", "consolidated")
    assert_same(read_demos(path), tiny())
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "<U4"},
        {"dtype": "|V12"},
        {"dtype": [["a", "<f4"]]},
        {"dtype": "<M8[ns]"},
        {"dtype": "<c8"},
        {"compressor": {"id": "vlen-utf8"}},
        {"filters": [{"id": "json2"}]},
    ],
)
def test_what_is_no_number_is_refused(path, changes):
    edit(path / "data/state/.zarray", **changes)
    with pytest.raises(DataError, match=r"data/state/.zarray: .* cannot be read; only plain numbers"):
        read_demos(path, {"state": "state"})


def test_an_existing_place_is_kept(path):
    with pytest.raises(DataError, match="already exists"):
        write_zarr(tiny(1), path)
    assert_same(read_demos(path), tiny())


def test_a_full_disk_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(DataError, match="free space"):
            write_zarr(tiny(), tmp_path / "d.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
