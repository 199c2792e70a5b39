import math
import sys
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from difftori import cli
from difftori.data.formats import describe_demos, read_demos, write_lerobot, write_zarr
from difftori.data.normalize import fit_normalizer
from difftori.data.windows import Windows
from difftori.errors import DataError, MissingExtraError
from tests.support.demo_files import assert_same, tiny

PUSHT = Path(__file__).parents[3].parent / "shared" / "data" / "pusht_cchi_v7_replay.zarr"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.zarr", None, "no such file or folder"),
        ("d.zarr.zip", b"PK\x03\x04", "an archive. Fix: unpack it"),
        ("d.npz", b"PK\x03\x04", "Demos.load"),
        ("d.pkl", b"\x80\x04.", "unknown format. Fix: pass a zarr folder"),
        ("d.hdf5", b"rubbish", "no readable HDF5 file"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_demos(tmp_path / name)
    assert name in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="unknown format"):
        read_demos(tmp_path)


def test_a_folder_with_one_set_is_that_set(tmp_path):
    write_zarr(tiny(), tmp_path / "one.zarr")
    (tmp_path / "notes.txt").write_text("x")
    assert_same(read_demos(tmp_path), tiny())
    write_lerobot(tiny(), tmp_path / "two", fps=10, task="x")
    with pytest.raises(DataError, match=r"contains 2 data sets. Fix: choose one of .*one.zarr, .*two"):
        read_demos(tmp_path)


@pytest.mark.parametrize("write", [write_zarr, partial(write_lerobot, fps=10, task="x")])
def test_a_data_set_is_described_as_it_is_read(tmp_path, write, capsys):
    write(tiny(), tmp_path / "d")
    found = describe_demos(tmp_path / "d")
    demos = read_demos(tmp_path / "d")
    assert list(found.lengths) == demos.lengths
    named = {key.name: key for key in found.keys if key.name is not None}
    assert named.keys() == {"action", *demos.obs}
    for name, values in {"action": demos.actions, **demos.obs}.items():
        assert math.prod(named[name].shape or ()) == values[0].numel()
        if name not in ("state", "gripper", "action"):
            assert named[name].low is named[name].high is None
            continue
        each = values.flatten(1)
        assert named[name].low == pytest.approx(each.amin(0).tolist())
        assert named[name].high == pytest.approx(each.amax(0).tolist())
    assert cli.main(["data", str(tmp_path)]) == 0  # a folder with one data set stands for it
    out = capsys.readouterr().out
    assert f"{len(demos)} episodes, {sum(demos.lengths)} steps, 3 to 5 each" in " ".join(out.split())
    assert all(name in out for name in named)


def test_nan_is_shown_in_any_block(tmp_path):
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for episode in range(3):
            demo = file.create_group(f"data/demo_{episode}")
            demo["actions"] = np.full((4, 2), float(episode))
            demo["obs/state"] = np.full((4, 3), 1.0)
            demo["obs/state"][1, 1] = np.nan if episode == 1 else 1.0
    found = describe_demos(tmp_path / "d.hdf5")
    (state,) = (key for key in found.keys if key.name == "state")
    assert [math.isnan(number) for number in state.low] == [math.isnan(number) for number in state.high]
    assert [math.isnan(number) for number in state.low] == [False, True, False]
    row = next(row for row in found.table() if row["name"] == "state")
    assert (row["least"], row["greatest"]) == ("nan", "nan")
    (action,) = (row for row in found.table() if row["name"] == "action")
    assert (action["least"], action["greatest"]) == ("0 0", "2 2")


def test_nothing_is_described_for_what_is_no_data_set(tmp_path, capsys):
    assert cli.main(["data", str(tmp_path / "absent")]) == 1
    assert "no such file or folder. Fix:" in capsys.readouterr().err
    assert cli.main(["data"]) == 2
    assert "PATH" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["zarr", "h5py", "av", "pyarrow", "numcodecs"])
def test_the_extra_is_named_where_it_is_missing(tmp_path, missing, monkeypatch):
    write_zarr(tiny(), tmp_path / "d.zarr")
    write_lerobot(tiny(), tmp_path / "d", fps=10, task="x")
    (tmp_path / "d.h5").write_bytes(b"")
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    path = tmp_path / {"zarr": "d.zarr", "h5py": "d.h5"}.get(missing, "d")
    use = partial(write_zarr, tiny(), tmp_path / "e") if missing == "numcodecs" else partial(read_demos, path)
    with pytest.raises(MissingExtraError, match=rf"{missing} cannot be imported.*pip install 'difftori\[data\]'"):
        use()


@pytest.mark.parametrize("form", ["zarr", "lerobot", "hdf5"])
def test_whatever_byte_is_damaged_there_is_no_other_error(tmp_path, form):
    path = tmp_path / f"d.{form}"
    if form == "zarr":
        write_zarr(tiny(), path)
    elif form == "lerobot":
        write_lerobot(tiny(), path, fps=10, task="x")
    else:
        with h5py.File(path, "w") as file:
            for number in range(3):
                obs, actions = tiny().episode(number)
                file[f"data/demo_{number}/actions"] = actions.numpy()
                file[f"data/demo_{number}/obs/state"] = obs["state"].numpy()
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    rng, noticed = np.random.default_rng(0), 0
    for _ in range(25):
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        content = bytearray(whole)
        content[rng.integers(len(content))] = rng.integers(256)
        file.write_bytes(content)
        try:
            read_demos(path)
        except DataError:
            noticed += 1
        file.write_bytes(whole)
    assert noticed > 0
    assert len(read_demos(path)) == 3


@pytest.mark.skipif(not PUSHT.is_dir(), reason=f"no human demonstrations at {PUSHT}")
def test_the_human_demonstrations_of_push_t():
    demos = read_demos(PUSHT, {"state": "state", "keypoint": "keypoint"})
    assert (len(demos), sum(demos.lengths)) == (206, 25650)
    assert demos.shapes["keypoint"] == (torch.float32, (9, 2))
    train, validation = demos.split(0.02, torch.Generator().manual_seed(42))
    assert (len(train), len(validation)) == (202, 4)
    windows = Windows(train, n_obs_steps=2, horizon=16, n_action_steps=8)
    assert len(windows) == sum(length - 7 for length in train.lengths)
    batch = fit_normalizer(train)(windows.sample(64, torch.Generator().manual_seed(0)))
    assert batch.actions.abs().max() <= 1 + 1e-6
    assert batch.obs["state"].shape == (64, 2, 5)
    # The first present is the first step, seen twice: what the human did is the second action of the window.
    first = windows.batch(torch.tensor([0]))
    start = int(train.spans[0, 0])
    assert torch.equal(first.obs["state"][0], train.obs["state"][[start, start]])
    np.testing.assert_array_equal(first.actions[0, 1], train.actions[start])
