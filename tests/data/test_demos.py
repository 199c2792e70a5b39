import os
import pickle
import resource
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difftori.data.demos import Demos
from difftori.errors import DataError


def demos(n: int = 7) -> Demos:
    return Demos(torch.arange(n * 2.0).view(n, 2), torch.arange(n * 3.0).view(n, 3, 1))


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("obs", "actions", "words"),
    [
        (torch.zeros(3), torch.zeros(3, 2, 1), "shape"),
        (torch.zeros(3, 2), torch.zeros(3, 2), "shape"),
        (torch.zeros(3, 2), torch.zeros(4, 2, 1), "3 rows of obs and 4"),
        (torch.zeros(0, 2), torch.zeros(0, 2, 1), "at least one"),
        (torch.zeros(3, 2), torch.zeros(3, 2, 1, dtype=torch.long), "convert them to float"),
        (
            torch.tensor([[0.0], [1.0], [float("nan")]]),
            torch.zeros(3, 2, 1),
            "obs contains NaN or Inf in 1 of 3 rows, first in row 2",
        ),
        (
            torch.zeros(2, 1),
            torch.tensor([[[0.0]], [[float("inf")]]]),
            "actions contains NaN or Inf in 1 of 2 rows, first in row 1",
        ),
    ],
)
def test_faulty_demonstrations_are_refused_with_the_reason(obs, actions, words):
    with pytest.raises(DataError, match=words):
        Demos(obs, actions)


@given(n=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_batches_visit_every_row_once_and_carry_its_number(n, size, seed):
    data = demos(n)
    chunks = list(data.batches(size, torch.Generator().manual_seed(seed)))
    assert all(len(c.index) == size for c in chunks[:-1])
    order = torch.cat([c.index for c in chunks])
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(torch.cat([c.obs["state"][:, 0] for c in chunks]), data.obs[order])
    assert torch.equal(torch.cat([c.actions for c in chunks]), data.actions[order])


def test_order_comes_from_the_generator():
    def order(seed):
        return torch.cat([c.index for c in demos(20).batches(3, torch.Generator().manual_seed(seed))]).tolist()

    assert order(1) == order(1) != order(2)


def test_one_pass_in_order():
    batches = list(demos().in_order(3))
    assert [len(batch.index) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(7))


def test_batch_size_below_one_is_refused():
    with pytest.raises(DataError, match="batch_size is 0"):
        list(demos().batches(0, torch.Generator()))


def test_saved_and_loaded_are_equal(tmp_path):
    images = Demos(torch.randint(0, 255, (4, 3, 5, 5), dtype=torch.uint8), torch.randn(4, 2, 1))
    for data in (demos(), images):
        data.save(tmp_path / "new" / "demos.npz")
        again = Demos.load(tmp_path / "new" / "demos.npz")
        assert torch.equal(again.obs, data.obs)
        assert torch.equal(again.actions, data.actions)
        assert (again.obs.dtype, again.actions.dtype) == (data.obs.dtype, data.actions.dtype)
    assert os.listdir(tmp_path / "new") == ["demos.npz"]


def test_numpys_doubles_become_the_networks_floats(tmp_path):
    np.savez(tmp_path / "d.npz", obs=np.ones((3, 2)), actions=np.ones((3, 4, 1)))
    again = Demos.load(tmp_path / "d.npz")
    assert (again.obs.dtype, again.actions.dtype) == (torch.float32, torch.float32)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Demos.load(tmp_path / "absent.npz")


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "d.npz"
    demos().save(path)
    whole = path.read_bytes()
    for length in [0, 1, 50, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="d.npz"):
            Demos.load(path)


def test_a_flipped_byte_of_the_data_is_noticed(tmp_path):
    path = tmp_path / "d.npz"
    demos().save(path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"\x00\x00\x80\x3f")] ^= 1  # the number 1.0
    path.write_bytes(whole)
    with pytest.raises(DataError, match="CRC"):
        Demos.load(path)


@pytest.mark.parametrize("form", ["npz", "pickle", "npy"])
def test_a_pickle_is_refused_and_not_run(tmp_path, form):
    canary, path = tmp_path / "canary", tmp_path / "d.npz"
    if form == "npz":
        np.savez(path, obs=np.array([Canary(canary)], dtype=object), actions=np.zeros((1, 1, 1)))
    elif form == "npy":
        with path.open("wb") as file:
            np.save(file, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(DataError, match="refused"):
        Demos.load(path)
    assert not canary.exists()


def test_other_contents_are_named(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, obs=np.zeros((2, 1)), action=np.zeros((2, 1, 1)))
    with pytest.raises(DataError, match=r"no array named actions; it contains obs, action$"):
        Demos.load(path)
    np.savez(path, obs=np.array(["a", "b"]), actions=np.zeros((2, 1, 1)))
    with pytest.raises(DataError, match="obs is of type <U1"):
        Demos.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="a single array"):
        Demos.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("obs.npy", b"rubbish")
        archive.writestr("actions.npy", b"rubbish")
    with pytest.raises(DataError, match=r"d\.npz"):
        Demos.load(path)


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "d.npz"
    demos().save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(DataError, match="free space"):
            demos(10_000).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(Demos.load(path).obs, demos().obs)
    assert os.listdir(tmp_path) == ["d.npz"]
