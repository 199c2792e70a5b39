import io
import json
import os
import pickle
import resource
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from difftori.errors import CheckpointError
from difftori.runs.checkpoint import Checkpoints, digest, pack, replace_file, unpack, weights_digest


def state(value: float = 1.0):
    net = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    plain = {"a": [1, 2.5, None, True, "text", (3, 4)], "inf": float("inf"), "size": torch.Size([1, 2])}
    return {"value": value, "net": net.state_dict(), "optimizer": optimizer.state_dict(), "plain": plain}


def filled(tmp_path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in steps:
        checkpoints.save(step, state(step))
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(os.listdir(checkpoints.root))


def test_what_is_saved_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "checkpoints")
    assert checkpoints.latest() is None
    written = state()
    checkpoints.save(12, written)
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 12
    assert found.state["plain"] == written["plain"]
    assert torch.equal(found.state["net"]["weight"], written["net"]["weight"])
    assert found.state["optimizer"]["param_groups"] == written["optimizer"]["param_groups"]


def test_the_last_two_and_the_best_stay(tmp_path):
    checkpoints = filled(tmp_path)
    for step in (5, 10, 100, 1000):
        checkpoints.save(step, state(step), best=step == 5)
    assert names(checkpoints) == ["BEST", "step-100", "step-1000", "step-5"]
    assert checkpoints.best().state["value"] == 5
    checkpoints.save(1001, state(), best=True)
    assert names(checkpoints) == ["BEST", "step-1000", "step-1001"]


def test_without_a_best_one_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint is marked best"):
        filled(tmp_path, 1).best()


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = filled(tmp_path, 1)
    checkpoints.save(1, state(99))
    found = checkpoints.latest()
    assert found is not None
    assert found.state["value"] == 99
    assert names(checkpoints) == ["step-1"]


def test_a_kill_between_the_two_of_one_step_loses_neither(tmp_path):
    checkpoints = filled(tmp_path, 1)
    (checkpoints.root / "step-1").rename(checkpoints.root / "step-1.superseded")
    found = checkpoints.latest()
    assert found is not None
    assert found.state["value"] == 1
    assert names(checkpoints) == ["step-1"]


def flip(path: Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def truncate(path: Path) -> None:
    (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-1])


def forget(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


def lose(path: Path) -> None:
    (path / "state.pt").unlink()


def scramble(path: Path) -> None:
    (path / "MANIFEST.json").write_text("{")


def swap(path: Path) -> None:
    """The manifest of another step: the content is right, the place is not."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps(manifest | {"step": 1}))


@pytest.mark.parametrize("damage", [flip, truncate, forget, lose, scramble, swap])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, damage, caplog):
    checkpoints = filled(tmp_path, 1, 2)
    damage(checkpoints.root / "step-2")
    before = checkpoints.latest(repair=False)
    assert before is not None
    assert before.step == 1
    assert names(checkpoints) == ["step-1", "step-2"]
    found = checkpoints.latest()
    assert found is not None
    assert found.state["value"] == 1
    assert names(checkpoints) == ["corrupt-step-2", "step-1"]
    assert "damaged checkpoint skipped" in caplog.text
    checkpoints.save(2, state(22))
    damage(checkpoints.root / "step-2")  # again: the name corrupt-step-2 is taken
    checkpoints.latest()
    assert names(checkpoints) == ["corrupt-step-2", "corrupt-step-2-1", "step-1"]


def test_every_byte_of_a_manifest_counts(tmp_path):
    checkpoints = filled(tmp_path, 1)
    manifest = checkpoints.root / "step-1" / "MANIFEST.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1
        manifest.write_bytes(broken)
        with pytest.raises(CheckpointError):
            checkpoints.latest(repair=False)


def test_with_only_damaged_ones_there_is_an_error_again_and_again(tmp_path):
    checkpoints = filled(tmp_path, 1, 2)
    flip(checkpoints.root / "step-1")
    truncate(checkpoints.root / "step-2")
    content = digest((checkpoints.root / "step-1" / "state.pt").read_bytes())
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no valid checkpoint"):
            checkpoints.latest()
    assert names(checkpoints) == ["corrupt-step-1", "corrupt-step-2"]
    assert digest((checkpoints.root / "corrupt-step-1" / "state.pt").read_bytes()) == content


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_malicious_pickle_with_a_right_hash_is_refused_and_not_run(tmp_path, form):
    checkpoints = filled(tmp_path, 1, 2)
    target, canary = checkpoints.root / "step-2", tmp_path / "canary"
    if form == "torch":
        torch.save({"x": Canary(canary)}, target / "state.pt")
    else:
        (target / "state.pt").write_bytes(pickle.dumps({"x": Canary(canary)}))
    content = (target / "state.pt").read_bytes()
    files = {"state.pt": {"sha256": digest(content), "bytes": len(content)}}
    (target / "MANIFEST.json").write_text(json.dumps({"format": 1, "step": 2, "files": files}))
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1
    assert not canary.exists()


@pytest.mark.parametrize("value", [Canary("/nowhere"), np.float64(1), np.zeros(2), {1, 2}, Counter("a"), Path("x")])
def test_what_could_not_be_read_back_is_refused_at_writing(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"state\['deep'\]\[1\]"):
        filled(tmp_path, 1).save(2, {"deep": [0, value]})
    assert names(filled(tmp_path)) == ["step-1"]


def test_unpack_wants_a_dictionary(tmp_path):
    buffer = io.BytesIO()
    torch.save([1], buffer)
    with pytest.raises(CheckpointError, match="not the dictionary"):
        unpack(buffer.getvalue(), tmp_path / "x.pt")


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rubbish(tmp_path):
    checkpoints = filled(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match="earlier checkpoints are intact"):
                checkpoints.save(2, {"big": torch.zeros(10_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(checkpoints) == ["step-1"]
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1


def test_an_unwritable_place_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Checkpoints(tmp_path / "file").save(1, state())


PHASES = [(name, count) for name, most in (("mkdir", 1), ("fsync", 4), ("rename", 2)) for count in range(1, most + 1)]


@pytest.mark.parametrize(("call", "count"), [*PHASES, ("rmdir", 1), ("unlink", 1), ("unlink", 2)])
def test_a_kill_in_any_phase_of_saving_leaves_a_valid_checkpoint(tmp_path, in_child, monkeypatch, call, count):
    """The second save creates step-3 and drops step-1; the process dies at the `count`-th such call in it."""
    checkpoints = filled(tmp_path, 1, 2)
    original, seen = getattr(os, call), []

    def deadly(*args, **kwargs):
        seen.append(args)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(os, call, deadly)
    assert in_child(lambda: checkpoints.save(3, state(3))) == -signal.SIGKILL
    monkeypatch.undo()
    found = checkpoints.latest()
    assert found is not None
    assert found.step in (2, 3)
    assert not list(checkpoints.root.glob("corrupt*"))
    checkpoints.save(3, state(3))
    checkpoints.save(4, state(4))
    assert names(checkpoints) == ["step-3", "step-4"]


def test_replacing_a_file_is_all_or_nothing(tmp_path):
    path = tmp_path / "f"
    replace_file(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            replace_file(path, b"new content")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_weights_digest_sees_one_bit():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    first = weights_digest(net)
    assert first == weights_digest(net)
    with torch.no_grad():
        net[0].weight.view(torch.int16)[0, 0] ^= 1
    assert weights_digest(net) != first


def test_a_checkpoint_of_this_format_stays_readable(tmp_path):
    """The layout is a promise: name, manifest and state as written here by hand."""
    place = tmp_path / "checkpoints" / "step-7"
    place.mkdir(parents=True)
    torch.save({"a": torch.ones(2)}, place / "state.pt")
    content = (place / "state.pt").read_bytes()
    files = {"state.pt": {"sha256": digest(content), "bytes": len(content)}}
    (place / "MANIFEST.json").write_text(json.dumps({"format": 1, "step": 7, "files": files}))
    found = Checkpoints(tmp_path / "checkpoints").latest()
    assert found is not None
    assert found.state["a"].tolist() == [1, 1]
    shutil.rmtree(place)


def test_equal_states_give_equal_bytes_whatever_objects_they_share(tmp_path):
    """So the weights of a resumed run are the same file as those of an uninterrupted one."""
    network, name = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "".join(("n", "ame"))
    shared = [1, 2]
    state = {"weights": network.state_dict(), "texts": [name, name], "lists": (shared, shared), name: None}
    again = unpack(pack(state), tmp_path / "there")
    apart = {**again, "texts": ["".join(("na", "me")), "name"], "lists": ([1, 2], [1, 2])}
    assert pack(again) == pack(state) == pack(apart)
    assert again["weights"]._metadata == state["weights"]._metadata
