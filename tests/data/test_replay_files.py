import errno
import io
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difftori.data import _episodes
from difftori.data.replay import prune
from difftori.errors import CheckpointError
from difftori.runs.checkpoint import pack, unpack
from tests.support.naive_replay import compare, events, make_player, same, seeded


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def played(*steps: int, **options):
    player = make_player(**options)
    for count in steps:
        player.episode(count)
    return player


def through_a_checkpoint(state, tmp_path):
    return unpack(pack(state), tmp_path / "state.pt")


@given(
    before=events(), after=events(), stack=st.integers(1, 3), pixels=st.booleans(), capacity=st.sampled_from([20, 200])
)
@settings(max_examples=30, deadline=None)
def test_a_resumed_buffer_goes_on_exactly(tmp_path_factory, before, after, stack, pixels, capacity):
    """Save, load into a new buffer, go on in both: the same draws, also after the ring was overwritten."""
    folder = tmp_path_factory.mktemp("episodes")
    player = make_player(capacity, stack=stack, pixels=pixels)
    generator = seeded()

    def play(player, events, generator):
        segments = []
        for event, row in events:
            if event == "step" and row in player.growing and len(player.growing[row]) > 15:
                event = "terminate"
            player.play(event, row)
            if player.kept:
                segments.append(player.replay.sample(4, generator=generator))
                player.replay.update_priorities(segments[-1].index, torch.rand(4, generator=generator))
        return segments

    play(player, before, generator)
    state = through_a_checkpoint(player.replay.save(folder), folder)
    resumed = make_player(capacity, stack=stack, pixels=pixels)
    resumed.replay.load(folder, state)
    resumed.growing = {row: type(e)(list(e.obs), list(e.actions), list(e.rewards)) for row, e in player.growing.items()}
    resumed.kept, resumed.head, resumed.ticks = list(player.kept), player.head, player.ticks
    np.testing.assert_array_equal(resumed.replay._tree._sums, player.replay._tree._sums)
    assert len(resumed.replay) == len(player.replay)

    place = generator.get_state()
    straight = play(player, after, generator)
    generator.set_state(place)
    again = play(resumed, after, generator)
    assert all(same(one, other) for one, other in zip(straight, again, strict=True))
    if resumed.kept:
        compare(resumed, resumed.replay.sample(16, generator=generator))


def test_only_new_episodes_are_written_and_old_files_never_change(tmp_path):
    player = played(4, 5)
    player.replay.save(tmp_path)
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    player.episode(6)
    state = player.replay.save(tmp_path)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first} == first
    assert {name for _, _, name in state["episodes"]} == {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_resumed_buffer_writes_nothing_again(tmp_path):
    state = played(4, 5).replay.save(tmp_path)
    resumed = make_player()
    resumed.replay.load(tmp_path, state)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert resumed.replay.save(tmp_path)["episodes"] == state["episodes"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_another_folder_and_a_lost_file_are_made_whole(tmp_path):
    player = played(4, 5)
    player.replay.save(tmp_path / "one")
    next((tmp_path / "one").iterdir()).unlink()
    for folder in ("one", "two"):
        state = player.replay.save(tmp_path / folder)
        make_player().replay.load(tmp_path / folder, state)


def test_an_earlier_state_still_loads_after_the_ring_was_overwritten(tmp_path):
    player = played(8, 9, capacity=20)
    state, kept = player.replay.save(tmp_path), list(player.kept)
    for _ in range(5):
        player.episode(10)
        player.replay.save(tmp_path)
    old = make_player(capacity=20)
    old.replay.load(tmp_path, state)
    old.kept = kept
    compare(old, old.replay.sample(32, generator=seeded()))


def test_prune_deletes_what_no_state_names(tmp_path):
    player = played(8, 9, capacity=20)
    states = [player.replay.save(tmp_path)]
    for _ in range(3):
        player.episode(10)
        states.append(player.replay.save(tmp_path))
    (tmp_path / "episode-000000000000-0.npz.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    prune(tmp_path, states[-2:])
    left = {name for state in states[-2:] for _, _, name in state["episodes"]}
    assert {path.name for path in tmp_path.iterdir()} == left | {"notes.txt"}
    for state in states[-2:]:
        make_player(capacity=20).replay.load(tmp_path, state)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flip, "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged, its 0 bytes"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_damaged_or_missing_file_is_named_and_the_buffer_left_empty(tmp_path, harm, words):
    state = played(4, 5).replay.save(tmp_path)
    path = tmp_path / state["episodes"][1][2]
    harm(path)
    resumed = played(3)
    with pytest.raises(CheckpointError, match=words) as caught:
        resumed.replay.load(tmp_path, state)
    assert str(path) in str(caught.value)
    assert len(resumed.replay) == 0
    resumed.growing, resumed.kept, resumed.head = {}, [], 0
    resumed.episode(4)
    compare(resumed, resumed.replay.sample(4, generator=seeded()))


def stored(tmp_path, monkeypatch, save):
    """A file whose hash is right but whose content was made by `save`, and the state that names it."""
    player = played(4)

    def savez(buffer, frames, steps):
        save(buffer, frames, steps)

    monkeypatch.setattr(_episodes.np, "savez", savez)
    return player.replay.save(tmp_path)


def test_pickles_are_refused_even_with_the_right_hash(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    plain = np.savez

    def malicious(buffer, frames, steps):
        plain(buffer, frames=np.array([Canary(canary)], dtype=object), steps=steps)

    with pytest.raises(CheckpointError, match="pickled objects are refused"):
        make_player().replay.load(tmp_path, stored(tmp_path, monkeypatch, malicious))

    def bare(buffer, *_):
        buffer.write(pickle.dumps(Canary(canary)))

    with pytest.raises(CheckpointError, match="pickled objects are refused"):
        make_player().replay.load(tmp_path, stored(tmp_path, monkeypatch, bare))

    def array(buffer, frames, _):
        content = io.BytesIO()
        np.save(content, frames)
        buffer.write(content.getvalue())

    with pytest.raises(CheckpointError, match="not an episode"):
        make_player().replay.load(tmp_path, stored(tmp_path, monkeypatch, array))
    assert not canary.exists()


def test_another_shape_is_refused(tmp_path, monkeypatch):
    plain = np.savez

    def short(buffer, frames, steps):
        plain(buffer, frames=frames[1:], steps=steps)

    with pytest.raises(CheckpointError, match=r"contains float32 frames \(4, 2\).*expected float32 \(5, 2\)"):
        make_player().replay.load(tmp_path, stored(tmp_path, monkeypatch, short))


def test_a_buffer_made_otherwise_is_refused(tmp_path):
    state = played(4).replay.save(tmp_path)
    with pytest.raises(CheckpointError, match="made with"):
        make_player(length=4).replay.load(tmp_path, state)
    with pytest.raises(CheckpointError, match="format 2"):
        make_player().replay.load(tmp_path, state | {"format": 2})


def test_a_full_disk_while_saving_is_typed_and_leaves_the_earlier_files(tmp_path, monkeypatch):
    player = played(4)
    state = player.replay.save(tmp_path)
    player.episode(5)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_episodes.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left.*free space"):
        player.replay.save(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [state["episodes"][0][2]]
    make_player().replay.load(tmp_path, state)
    make_player().replay.load(tmp_path, player.replay.save(tmp_path))
