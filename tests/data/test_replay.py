import errno
import gc
import os
import re
import resource

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from difftori.agents.actor_critic import n_step
from difftori.data.replay import Replay
from difftori.errors import ConfigError, DataError, NonFiniteError
from tests.support.naive_replay import Player, compare, events, make_player, same, seeded

NAN = float("nan")


def drawable(replay: Replay) -> set[int]:
    """The slices that can be drawn at all, found by drawing very often."""
    return set(replay.sample(4000, generator=seeded(9)).index.tolist())


@pytest.mark.parametrize(("stack", "pixels"), [(1, False), (3, True), (2, False), (1, True)])
@pytest.mark.parametrize("storage", ["memory", "device", "mmap"])
@given(events=events(), capacity=st.integers(15, 60), length=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_slices_are_those_of_a_list_based_buffer(
    stack, pixels, storage, events, capacity, length, seed, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("ring") if storage == "mmap" else None
    player = make_player(capacity, length, stack, pixels, storage=storage, folder=folder)
    generator = seeded(seed)
    for event, row in events:
        if event != "drop" and row in player.growing and len(player.growing[row]) == capacity - 1:
            event = "truncate"
        player.play(event, row)
        assert len(player.replay) == sum(map(len, player.kept))
        if event in ("terminate", "truncate"):
            segment = player.replay.sample(8, generator=generator)
            compare(player, segment)
            player.replay.update_priorities(segment.index, torch.rand(8, generator=generator))
    if player.kept:
        leaves = player.replay._tree.leaves
        starts = {position % len(leaves) for position in player.starts()}
        assert set(np.flatnonzero(leaves).tolist()) == starts


@given(count=st.integers(1, 30), steps=st.integers(1, 12), length=st.integers(1, 5))
def test_the_oldest_whole_episodes_go_and_the_ring_never_holds_more_than_its_capacity(count, steps, length):
    player = make_player(capacity=33, length=length)
    for _ in range(count):
        player.episode(steps)
        assert len(player.replay) <= 33
    compare(player, player.replay.sample(64, generator=seeded()))


def test_the_last_starts_of_an_episode_can_be_drawn_only_if_it_terminated():
    player = make_player(length=3)
    player.episode(6)
    player.episode(2)
    player.episode(4, "terminate")
    assert drawable(player.replay) == {0, 1, 2, 3, 7, 10, 11, 12, 13}


def test_short_segments_begin_at_every_state_and_bootstrap_at_a_time_limit():
    player = make_player(length=3, short=True)
    player.episode(6)
    player.episode(2)
    assert drawable(player.replay) == {0, 1, 2, 3, 4, 5, 7, 8}
    segment = player.replay.sample(200, generator=seeded())
    last = segment.index.tolist().index(5)
    transition = n_step(segment, 0.5)
    assert segment.mask[:, last].tolist() == [1.0, 0.0, 0.0]
    assert transition.discounts[last] == 0.5
    np.testing.assert_array_equal(transition.obs[last], player.kept[0].obs[5])
    np.testing.assert_array_equal(transition.next_obs[last], player.kept[0].obs[6])
    assert transition.rewards[last] == player.kept[0].rewards[5]


def test_truncation_bootstraps_and_termination_does_not():
    for end, ended in [("terminate", [False, False, True]), ("truncate", [False] * 3)]:
        player = make_player(length=3)
        player.episode(3, end)
        segment = player.replay.sample(50, generator=seeded())
        whole = segment.index.tolist().index(0)
        assert segment.terminated[:, whole].tolist() == ended
        assert segment.mask[:, whole].tolist() == [1.0] * 3
        np.testing.assert_array_equal(segment.obs[-1, whole], player.kept[0].obs[-1])


def test_an_episode_shorter_than_a_slice_is_one_slice_padded_and_masked():
    player = make_player(length=5, stack=3, pixels=True)
    player.episode(2, "terminate")
    segment = player.replay.sample(50, generator=seeded())
    for start, mask in ((0, [1, 1, 0, 0, 0]), (1, [1, 0, 0, 0, 0])):
        row = segment.index.tolist().index(start)
        assert segment.mask[:, row].tolist() == mask
        assert segment.terminated[:, row].tolist() == [step == 1 - start for step in range(5)]
    compare(player, segment)


def test_draws_follow_the_priorities():
    player = make_player(capacity=100, length=3)
    for steps in (5, 9, 2, 12):
        player.episode(steps)
    starts = torch.tensor(sorted(player.starts()))
    priorities = torch.linspace(0.1, 9.0, len(starts)).double()[torch.randperm(len(starts))]
    player.replay.update_priorities(starts, priorities)
    draws = 40_000
    segment = player.replay.sample(draws, generator=seeded(1))
    chances = (priorities.numpy() + 1e-6) ** 0.6
    chances /= chances.sum()
    counts = np.array([(segment.index == s).sum() for s in starts])
    assert counts.sum() == draws
    assert chisquare(counts, chances * draws).pvalue > 1e-3
    # And the test can tell: the same counts do not fit priorities without the exponent.
    assert chisquare(counts, priorities.numpy() / priorities.numpy().sum() * draws).pvalue < 1e-6
    weights = (len(starts) * chances) ** -0.4
    drawn = np.searchsorted(starts.numpy(), segment.index.numpy())
    np.testing.assert_allclose(segment.weights, (weights / weights.max())[drawn], rtol=1e-5)


def test_new_episodes_get_the_greatest_priority_there_is():
    player = make_player(capacity=100, length=1)
    player.episode(2)
    player.replay.update_priorities(torch.tensor([0, 1]), torch.tensor([4.0, 7.0]))
    player.episode(1)
    leaves = player.replay._tree.leaves
    assert leaves[3] == leaves[1] == pytest.approx((7 + 1e-6) ** 0.6)


def test_priorities_of_overwritten_slices_are_passed_over():
    player = make_player(capacity=8, length=2)
    player.episode(4)
    old = player.replay.sample(4, generator=seeded())
    player.episode(8)
    before = player.replay._tree.leaves.copy()
    player.replay.update_priorities(old.index, torch.full((4,), 100.0))
    np.testing.assert_array_equal(player.replay._tree.leaves, before)


def test_a_dropped_episode_leaves_nothing():
    player = make_player()
    player.play("step", 1)
    player.play("drop", 1)
    player.replay.drop(0)
    player.episode(3, row=1)
    assert len(player.replay) == 3
    compare(player, player.replay.sample(5, generator=seeded()))


def test_a_segment_stays_as_it_is_while_others_are_drawn_and_recorded():
    player = make_player(capacity=60, stack=3, pixels=True)
    player.episode(20)
    generator = seeded()
    kept = [player.replay.sample(16, generator=generator) for _ in range(5)]
    tails = [segment.obs[-1] for segment in kept]
    copies = [segment.obs.clone() for segment in kept]
    ends = [copy[-1].clone() for copy in copies]
    del kept[0]
    for _ in range(6):
        player.episode(20)
        player.replay.sample(16, generator=generator)
    assert all(torch.equal(segment.obs, copy) for segment, copy in zip(kept, copies[1:], strict=True))
    assert all(torch.equal(tail, end) for tail, end in zip(tails, ends, strict=True))


def test_the_batch_buffer_is_used_again_and_stacks_are_views():
    player = make_player(stack=3, pixels=True)
    player.episode(20)
    places = set()
    for _ in range(10):
        segment = player.replay.sample(16, generator=seeded())
        places.add(segment.obs.untyped_storage().data_ptr())
        assert segment.obs.untyped_storage().nbytes() == 16 * (3 + 3) * 2
    assert len(places) <= 2


def test_the_draw_comes_from_the_generator():
    player = make_player()
    player.episode(30)
    draw = player.replay.sample
    assert same(draw(9, generator=seeded(1)), draw(9, generator=seeded(1)))
    assert not same(draw(9, generator=seeded(1)), draw(9, generator=seeded(2)))


def test_segment_to_device_carries_everything():
    player = make_player(stack=3, pixels=True)
    player.episode(7)
    segment = player.replay.sample(4, generator=seeded())
    assert same(segment, segment.to("cpu"))
    assert segment.to("meta").obs.shape == segment.obs.shape


OBS, ACTION = np.zeros(2, np.float32), np.zeros(2, np.float32)


def started() -> Player:
    player = make_player(capacity=5, length=2)
    player.episode(3)
    player.play("step", 0)
    return player


def step(player: Player, action=ACTION, reward=0.0, obs=OBS, row=0):
    player.replay.add(row, action, reward, obs, terminated=False, truncated=False)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: step(p, reward=NAN), NonFiniteError, "row 0, step 1: the reward contains nan"),
        (lambda p: step(p, reward=1e39), NonFiniteError, "the reward contains inf"),
        (
            lambda p: step(p, action=np.array([0, NAN])),
            NonFiniteError,
            r"row 0, step 1: the action contains nan at \[1\]",
        ),
        (
            lambda p: step(p, obs=np.array([0, np.inf], np.float32)),
            NonFiniteError,
            r"observation contains inf at \[1\]",
        ),
        (lambda p: p.replay.begin(1, np.array([NAN, 0])), NonFiniteError, "row 1, first observation"),
        (lambda p: step(p, action=np.zeros(3)), DataError, r"action has shape \(3,\); it must be \(2,\)"),
        (lambda p: step(p, obs=np.zeros(3)), DataError, r"observation is float64 of shape \(3,\)"),
        (lambda p: step(p, row=1), DataError, r"call begin\(1, obs\) first"),
        (lambda p: step(p, row=2), DataError, "row 2 of 2"),
        (lambda p: p.replay.begin(0, OBS), DataError, r"episode of 1 steps has not ended. Fix: end it, or drop\(0\)"),
        (lambda p: [step(p) for _ in range(5)], DataError, "longer than the capacity of 5 steps"),
        (lambda p: p.replay.sample(0, generator=seeded()), DataError, "cannot sample 0 segments"),
        (
            lambda p: p.replay.update_priorities(torch.tensor([0, 1]), torch.tensor([1.0, NAN])),
            NonFiniteError,
            "1 of 2 priorities are NaN or Inf, first nan of row 1",
        ),
        (
            lambda p: p.replay.update_priorities(torch.tensor([0, 1]), torch.tensor([1.0, -2.0])),
            DataError,
            "segment at 1 to -2.0",
        ),
        (lambda p: p.replay.update_priorities(torch.tensor([2]), torch.ones(1)), DataError, "no segment starts there"),
        (lambda p: p.replay.update_priorities(torch.tensor([90]), torch.ones(1)), DataError, "segment at 90"),
    ],
)
def test_faults_are_named_and_change_nothing(call, error, words):
    player = started()
    before = player.replay._tree.leaves.copy()
    with pytest.raises(error, match=words):
        call(player)
    np.testing.assert_array_equal(player.replay._tree.leaves, before)
    assert len(player.replay) == 3


def test_an_episode_goes_on_after_a_refused_step():
    player = make_player()
    player.play("step")
    with pytest.raises(NonFiniteError):
        step(player, reward=NAN)
    player.play("terminate")
    compare(player, player.replay.sample(4, generator=seeded()))


def test_frames_that_do_not_follow_are_refused():
    player = make_player(stack=3, pixels=True)
    with pytest.raises(DataError, match="not 3 equal frames.*--obs pixels"):
        player.replay.begin(0, np.arange(6, dtype=np.uint8).reshape(6, 1, 1))
    player.play("step")
    with pytest.raises(DataError, match="not the first observation of the next episode"):
        player.replay.add(0, np.zeros(2), 0.0, np.full((6, 1, 1), 99, np.uint8), terminated=False, truncated=True)


def test_an_empty_buffer_cannot_be_drawn_from():
    with pytest.raises(DataError, match="after at least one whole episode"):
        make_player().replay.sample(1, generator=seeded())


def test_every_faulty_setting_is_listed():
    with pytest.raises(ConfigError) as caught:
        Replay(
            0,
            obs_shape=(4, 84, 84),
            obs_dtype=np.int64,
            action_dim=0,
            length=0,
            stack=3,
            num_rows=0,
            alpha=-1.0,
            storage="mmap",
        )
    words = (
        "capacity is 0|action_dim is 0|length is 0|num_rows is 0|obs_shape|obs_dtype is int64|alpha is -1|folder None"
    )
    assert [re.search(words, fault) is not None for fault in caught.value.faults] == [True] * 8


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match="No space left on device.*lower the capacity"):
        make_player(storage="mmap", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_ends_too_early_is_one_too(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match="no 0.84 GB of disk space in"):
            make_player(capacity=10**8, storage="mmap", folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_mapped_ring_leaves_no_file(tmp_path):
    player = make_player(storage="mmap", folder=tmp_path)
    player.episode(9)
    compare(player, player.replay.sample(4, generator=seeded()))
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow():
    replay = Replay(500, obs_shape=(9, 32, 32), obs_dtype=np.uint8, action_dim=2, length=5, stack=3)
    obs, generator = np.zeros((9, 32, 32), np.uint8), seeded()

    def record():
        replay.begin(0, obs)
        for t in range(50):
            replay.add(0, ACTION, 0.0, obs, terminated=False, truncated=t == 49)

    def work(count):
        for i in range(count):
            if i % 25 == 0:
                record()
            segment = replay.sample(64, generator=generator)
            replay.update_priorities(segment.index, segment.weights)

    work(400)
    gc.collect()
    before = psutil.Process().memory_info().rss
    work(1500)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 5e6


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["memory", "device"])
def test_a_gpu_gets_the_same_segments(storage):
    on_cpu = make_player(stack=3, pixels=True)
    on_gpu = make_player(stack=3, pixels=True, storage=storage, device="cuda")
    for player in (on_cpu, on_gpu):
        for _ in range(5):
            player.episode(12)
    for seed in range(4):
        segment = on_gpu.replay.sample(32, generator=seeded(seed))
        assert segment.obs.is_cuda
        assert same(segment.to("cpu"), on_cpu.replay.sample(32, generator=seeded(seed)))
        on_gpu.replay.update_priorities(segment.index, segment.weights)
        on_cpu.replay.update_priorities(segment.index.cpu(), segment.weights.cpu())
