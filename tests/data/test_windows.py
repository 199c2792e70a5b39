import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difftori.data.trajectories import Trajectories
from difftori.data.windows import Windows
from difftori.errors import ConfigError, ShapeError
from difftori.types import Window, flat_rows


def counted(lengths, gaps=False):
    """State and actions say their own step; the image says it too, modulo 256."""
    steps = sum(lengths)
    count = np.arange(steps, dtype=np.float32)
    image = np.broadcast_to((count % 256).astype(np.uint8)[:, None, None, None], (steps, 2, 2, 3))
    made = Trajectories.of({"state": np.stack([count, count], 1), "image": image}, -count, np.cumsum(lengths))
    return made.select(range(0, len(lengths), 2)) if gaps else made


def naive(demos, n_obs_steps, horizon, n_action_steps):
    """The steps of observations and actions of each window, by lists that are padded and cut."""
    windows = []
    for start, stop in demos.spans.tolist():
        steps = list(range(start, stop))
        padded = [steps[0]] * (n_obs_steps - 1) + steps + [steps[-1]] * (n_action_steps - 1)
        cut = [padded[i : i + horizon] for i in range(len(padded) - horizon + 1)]
        if not cut:
            cut = [padded + [steps[-1]] * (horizon - len(padded))]
        windows += [(window[:n_obs_steps], window) for window in cut]
    return windows


def make(lengths=(6, 3), n_obs_steps=2, horizon=4, n_action_steps=2, **options):
    return Windows(counted(lengths), n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps, **options)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    n_obs_steps=st.integers(1, 4),
    n_action_steps=st.integers(1, 5),
    more=st.integers(0, 5),
    gaps=st.booleans(),
)
def test_windows_are_those_of_padded_lists(lengths, n_obs_steps, n_action_steps, more, gaps):
    demos = counted(lengths, gaps)
    horizon = n_obs_steps - 1 + n_action_steps + more
    windows = Windows(demos, n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps)
    expected = naive(demos, n_obs_steps, horizon, n_action_steps)
    assert len(windows) == len(expected)
    batch = windows.batch(torch.arange(len(windows)))
    assert batch.obs["state"][..., 0].tolist() == [seen for seen, _ in expected]
    assert (-batch.actions[..., 0]).tolist() == [done for _, done in expected]
    assert batch.obs["image"][:, :, 1, 1, 2].tolist() == [[step % 256 for step in seen] for seen, _ in expected]
    spans = demos.spans[windows.episodes(batch.index)]
    assert (batch.obs["state"][..., 0] >= spans[:, :1]).all()
    assert (-batch.actions[..., 0] < spans[:, 1:]).all()


def test_shapes_and_types():
    batch = make().sample(5, torch.Generator())
    assert batch.obs["image"].shape == (5, 2, 2, 2, 3)
    assert batch.obs["image"].dtype == torch.uint8
    assert batch.obs["state"].shape == (5, 2, 2)
    assert batch.actions.shape == (5, 4, 1)
    assert batch.index.shape == (5,)


def test_a_pass_visits_every_window_once_with_its_number():
    windows = make((9, 5, 7))
    batches = list(windows.batches(4, torch.Generator().manual_seed(0)))
    assert all(len(batch.index) == 4 for batch in batches[:-1])
    index = torch.cat([batch.index for batch in batches])
    assert sorted(index.tolist()) == list(range(len(windows)))
    whole = windows.batch(index)
    assert torch.equal(torch.cat([batch.actions for batch in batches]), whole.actions)
    assert torch.equal(torch.cat([batch.obs["state"] for batch in batches]), whole.obs["state"])


def test_order_and_draws_come_from_the_generator():
    windows = make((9, 5, 7))

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        passed = torch.cat([batch.index for batch in windows.batches(4, generator)])
        return [*passed.tolist(), *windows.sample(8, generator).index.tolist()]

    assert drawn(1) == drawn(1) != drawn(2)


def test_more_can_be_drawn_than_there_are():
    windows = make((2,))
    index = windows.sample(200, torch.Generator()).index
    assert set(index.tolist()) == set(range(len(windows)))


def test_a_batch_that_is_kept_does_not_change():
    windows = make((9, 5, 7))
    kept = [windows.batch(torch.tensor([number])) for number in range(6)]
    for number, batch in enumerate(kept):
        assert torch.equal(batch.actions, windows.batch(torch.tensor([number])).actions)


def test_observations_stand_in_one_row():
    demos = counted((6, 3))
    vectors = Trajectories({"a": demos.obs["state"], "b": demos.obs["state"] + 100}, demos.actions, demos.spans)
    windows = Windows(vectors, n_obs_steps=2, horizon=4, n_action_steps=2)
    assert flat_rows(windows.batch(torch.tensor([3])).obs).tolist() == [[2, 2, 3, 3, 102, 102, 103, 103]]


def test_images_do_not():
    with pytest.raises(ShapeError, match="image cannot be flattened into one row"):
        flat_rows(make().batch(torch.tensor([0])).obs)


def test_one_pass_in_order():
    windows = make()
    batches = list(windows.in_order(5))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(len(windows)))
    assert torch.equal(
        torch.cat([batch.actions for batch in batches]), windows.batch(torch.arange(len(windows))).actions
    )


def test_every_faulty_setting_is_listed():
    with pytest.raises(ConfigError) as caught:
        make(n_obs_steps=0, horizon=0, n_action_steps=-1)
    assert len(caught.value.faults) == 3
    with pytest.raises(ConfigError, match="make horizon at least 5"):
        make(n_obs_steps=2, horizon=4, n_action_steps=4)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        make().sample(0, torch.Generator())


@pytest.mark.parametrize("index", [-1, 99])
def test_a_window_that_is_not_there_is_refused(index):
    with pytest.raises(ShapeError, match=f"no window {index}"):
        make().batch(torch.tensor([index]))


def test_to_moves_everything():
    batch = make().batch(torch.tensor([0])).to("meta")
    assert isinstance(batch, Window)
    assert {values.device.type for values in (*batch.obs.values(), batch.actions, batch.index)} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("stored", ["cpu", "cuda"])
def test_a_gpu_gets_the_same_windows(stored):
    demos = counted((9, 5, 7))
    there = Trajectories(
        {name: values.to(stored) for name, values in demos.obs.items()}, demos.actions.to(stored), demos.spans
    )
    one = Windows(demos, n_obs_steps=2, horizon=4, n_action_steps=2)
    other = Windows(there, n_obs_steps=2, horizon=4, n_action_steps=2, device="cuda")
    for seed in range(3):
        ours, theirs = (windows.sample(16, torch.Generator().manual_seed(seed)) for windows in (one, other))
        assert theirs.actions.is_cuda
        assert torch.equal(theirs.actions.cpu(), ours.actions)
        assert torch.equal(theirs.obs["image"].cpu(), ours.obs["image"])
        assert torch.equal(theirs.index.cpu(), ours.index)
    if stored == "cuda":
        with pytest.raises(ConfigError, match="choose one"):
            Windows(there, n_obs_steps=2, horizon=4, n_action_steps=2, device="cpu")
