import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch

from difftori.data.formats import read_demos
from difftori.errors import DataError
from tests.support.demo_files import Canary, assert_same, tiny

ENDS = [2 * number + 2 for number in range(12)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "d.hdf5"
    demos = tiny(ends=ENDS)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = '{"env_name": "Tiny"}'
        data.attrs["total"] = ENDS[-1]
        for number in range(len(demos)):
            obs, actions = demos.episode(number)
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = len(actions)
            demo["actions"] = actions.numpy().astype(np.float64)
            demo["dones"] = np.zeros(len(actions), np.int64)
            demo["next_obs/state"] = obs["state"].numpy()
            for name, values in obs.items():
                demo.create_dataset(f"obs/{name}", data=values.numpy(), chunks=True, compression="gzip")
        file["mask/few"] = np.array([b"demo_10", b"demo_2"])
        file["mask/words"] = np.array(["demo_1"], dtype=h5py.string_dtype())
    return path


@pytest.fixture
def path(written, tmp_path):
    return shutil.copy(written, tmp_path / "d.hdf5")


def change(path, key, value):
    with h5py.File(path, "r+") as file:
        if key in file:
            del file[key]
        file[key] = value


def test_a_file_is_read_in_the_order_of_its_numbers(path):
    again = read_demos(path)
    assert_same(again, tiny(ends=ENDS))
    assert again.about == {"env_args": '{"env_name": "Tiny"}'}


def test_a_list_in_mask_chooses(path):
    assert_same(read_demos(path, subset="few"), tiny(ends=ENDS).select([2, 10]))
    assert_same(read_demos(path, subset="words"), tiny(ends=ENDS).select([1]))


def test_entries_are_joined_and_renamed(path):
    again = read_demos(path, {"low": ("obs/state", "dones"), "next": "next_obs/state"}, action="obs/gripper")
    demos = tiny(ends=ENDS)
    assert torch.equal(again.obs["low"][:, :3], demos.obs["state"])
    assert again.obs["low"].shape[1] == 4
    assert torch.equal(again.obs["next"], demos.obs["state"])
    assert torch.equal(again.actions, demos.obs["gripper"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data/demo_3/obs/state", np.zeros((1, 3)), "demo_3/obs/state has 1 steps, but its actions 2"),
        (
            "data/demo_3/obs/state",
            np.zeros((2, 4)),
            r"steps have the shape \(4,\) from step 6 \(episode 3, its step 0\)",
        ),
        ("data/demo_3/actions", np.zeros((1, 2)), "demo_3/actions has 1 steps, but num_samples is 2"),
        ("data/demo_3/actions", np.zeros((0, 2)), "demo_3/actions has 0 steps"),
        ("data/demo_3/actions", np.full((2, 2), np.nan), "actions: holds nan at step 6 .episode 3"),
        ("data/demo_0/actions", np.float64(3), "demo_0/actions is not an array of steps"),
        ("data/demo_3/obs/state", np.array(["a", "b"], dtype=h5py.string_dtype()), "holds object; only plain numbers"),
        ("data/demo_3/obs/state", np.array([b"a", b"b"]), r"holds \|S1; only plain numbers"),
        ("data/demo_3/obs/state", np.zeros(2, [("a", "f4")]), "only plain numbers"),
        (
            "data/other",
            np.zeros(3),
            "data/other is not a demonstration. Fix: rename it; demonstrations are named demo_0",
        ),
        ("data/demo_12", np.zeros(3), "data/demo_12 is not a group"),
        ("data/demo_3/obs", h5py.SoftLink("/data/demo_2/obs"), "demo_3/obs is a SoftLink to '/data/demo_2/obs'"),
        ("data/demo_3/obs", h5py.ExternalLink("x.h5", "/obs"), "demo_3/obs is a ExternalLink to '/obs'"),
        ("data/demo_3", h5py.ExternalLink("x.h5", "/demo"), "data/demo_3 is a ExternalLink"),
        ("data", h5py.ExternalLink("x.h5", "/data"), "/data is a ExternalLink"),
        ("data", np.zeros(3), "/data is not a group"),
    ],
)
def test_a_faulty_file_is_refused_with_the_place(path, key, value, words):
    change(path, key, value)
    with pytest.raises(DataError, match=words) as caught:
        read_demos(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        ("none", "no list mask/none. Fix: choose from few, ghosts, numbers, words"),
        ("ghosts", "data/demo_99 does not exist"),
        ("numbers", "mask/numbers is not a list of names"),
    ],
)
def test_a_wrong_list_is_refused(path, subset, words):
    change(path, "mask/ghosts", np.array([b"demo_99"]))
    change(path, "mask/numbers", np.arange(3))
    with pytest.raises(DataError, match=words):
        read_demos(path, subset=subset)


def test_a_file_without_lists_or_demonstrations_is_refused(tmp_path):
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file.create_group("data")
    with pytest.raises(DataError, match="no demonstrations"):
        read_demos(tmp_path / "d.h5")
    with pytest.raises(DataError, match="/mask does not exist"):
        read_demos(tmp_path / "d.h5", subset="train")


def test_numbers_kept_in_other_files_are_not_read(path, tmp_path):
    (tmp_path / "secret.raw").write_bytes(bytes(48))
    with h5py.File(path, "r+") as file:
        del file["data/demo_0/obs/state"], file["data/demo_1/obs/state"]
        outside = [(tmp_path / "secret.raw", 0, 48)]
        file["data/demo_0/obs"].create_dataset("state", (2, 3), "f8", external=outside)
        layout = h5py.VirtualLayout((2, 3), "f4")
        layout[...] = h5py.VirtualSource(str(tmp_path / "x.h5"), "state", (2, 3))
        file["data/demo_1/obs"].create_virtual_dataset("state", layout)
    with pytest.raises(DataError, match="demo_0/obs/state is stored in another file"):
        read_demos(path)
    change(path, "data/demo_0/obs/state", np.zeros((2, 3)))
    with pytest.raises(DataError, match="demo_1/obs/state is stored in another file"):
        read_demos(path)


@pytest.mark.parametrize("chunks", [None, (1, 3)])
def test_numbers_that_were_never_written_are_not_taken_for_zeros(path, chunks):
    with h5py.File(path, "r+") as file:
        del file["data/demo_3/obs/state"]
        made = file["data/demo_3/obs"].create_dataset("state", (2, 3), "f4", chunks=chunks)
        if chunks:
            made[0] = 1.0
    with pytest.raises(DataError, match="demo_3/obs/state is incomplete"):
        read_demos(path)


def test_a_filter_that_would_load_a_plug_in_is_refused(path):
    with h5py.File(path, "r+") as file:
        del file["data/demo_0/obs/state"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((2, 3))
        settings.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((2, 3))
        h5py.h5d.create(file["data/demo_0/obs"].id, b"state", h5py.h5t.IEEE_F32LE, space, settings)
    with pytest.raises(DataError, match="compressed by filter 32015"):
        read_demos(path)


@pytest.mark.parametrize("how", ["opaque", "object"])
def test_pickles_are_refused_and_not_run(path, tmp_path, how):
    content = pickle.dumps(Canary(tmp_path / "canary"))
    if how == "opaque":
        change(path, "data/demo_0/obs/state", np.array([np.void(content)] * 2))
    else:
        kind = h5py.vlen_dtype(np.uint8)
        values = np.empty(2, object)
        values[:] = [np.frombuffer(content, "u1")] * 2
        with h5py.File(path, "r+") as file:
            del file["data/demo_0/obs/state"]
            file["data/demo_0/obs"].create_dataset("state", data=values, dtype=kind)
    with pytest.raises(DataError, match="objects never|no array"):
        read_demos(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("left", [0, 4, 8, 100, 0.3, 0.9, -1])
def test_every_truncation_is_an_error(path, left):
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(DataError, match=r"d\.hdf5"):
        read_demos(path)


def test_a_damaged_block_is_noticed(path):
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        chunk = file["data/demo_5/obs/image"].id.get_chunk_info(0)
    content[chunk.byte_offset + 4 : chunk.byte_offset + 12] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(DataError, match="demo_5/obs/image cannot be read"):
        read_demos(path)


def test_deeper_groups_are_named_by_their_path(path):
    demos = tiny(ends=ENDS)
    with h5py.File(path, "r+") as file:
        for number in range(len(ENDS)):
            file[f"data/demo_{number}/obs/arm/left/joints"] = demos.episode(number)[0]["state"].numpy()
        file["data/demo_0/obs/arm/link"] = h5py.SoftLink("/data/demo_0/obs/state")
    with pytest.raises(DataError, match="obs/arm/link is a SoftLink"):
        read_demos(path)
    again = read_demos(path, {"joints": "obs/arm/left/joints", "same": "arm_left_joints"})
    assert torch.equal(again.obs["joints"], demos.obs["state"])
    assert torch.equal(again.obs["same"], demos.obs["state"])


def test_groups_in_a_circle_end(path):
    with h5py.File(path, "r+") as file:
        file["data/demo_0/obs/again"] = file["data/demo_0"]
    assert len(read_demos(path, {"state": "obs/state"})) == len(ENDS)
