import numpy as np
import pytest
import torch

from difftori.data.trajectories import Trajectories, make_spans
from difftori.errors import DataError

ENDS = [4, 7, 9]


def some(ends=ENDS, **entries):
    steps = ends[-1]
    state = np.arange(steps * 2.0).reshape(steps, 2)
    return Trajectories.of({"state": state, **entries}, -state, ends, {"env": "test"})


def test_types_become_float32_and_uint8():
    image = np.arange(9 * 4 * 4 * 3).reshape(9, 4, 4, 3) % 256
    made = some(
        count=np.arange(9),
        flag=torch.ones(9, 3, dtype=torch.bool),
        half=torch.ones(9, 3, dtype=torch.bfloat16, requires_grad=True),
        byte_vector=np.ones((9, 2), np.uint8),
        cloud=np.random.default_rng(0).normal(size=(9, 5, 3)).astype(">f8"),
        image=image.astype(np.uint8),
        float_image=image.astype(np.float32),
        unit_image=(image / 255).astype(np.float32),
        blurred=(image / 254.7).clip(0, 1).astype(np.float32),
        mask=(image > 90).astype(np.float64),
        channels_first=np.zeros((9, 3, 4, 5), np.uint8),
        grey=np.zeros((9, 16, 20), np.uint8),
        depth=np.ones((9, 33, 40)),
        depth_first=np.ones((9, 1, 8, 6), np.float32),
        seen=np.ones((9, 16, 20), bool),
    )
    assert made.shapes == {
        "state": (torch.float32, (2,)),
        "count": (torch.float32, (1,)),
        "flag": (torch.float32, (3,)),
        "half": (torch.float32, (3,)),
        "byte_vector": (torch.float32, (2,)),
        "cloud": (torch.float32, (5, 3)),
        "image": (torch.uint8, (4, 4, 3)),
        "float_image": (torch.uint8, (4, 4, 3)),
        "unit_image": (torch.uint8, (4, 4, 3)),
        "blurred": (torch.float32, (4, 4, 3)),
        "mask": (torch.float32, (4, 4, 3)),
        "channels_first": (torch.uint8, (4, 5, 3)),
        "grey": (torch.uint8, (16, 20, 1)),
        "depth": (torch.float32, (33, 40, 1)),
        "depth_first": (torch.float32, (8, 6, 1)),
        "seen": (torch.float32, (16, 20, 1)),
        "action": (torch.float32, (2,)),
    }
    assert torch.equal(made.obs["float_image"], made.obs["image"])
    assert torch.equal(made.obs["unit_image"], made.obs["image"])
    assert torch.equal(made.obs["mask"], torch.from_numpy(image > 90).float())
    assert made.about == {"env": "test"}


def test_arrays_are_copied():
    state = np.zeros((4, 2), np.float32)
    made = Trajectories.of({"state": state}, state, [4])
    state += 1
    assert made.obs["state"].sum() == 0


def test_episodes_lie_where_the_ends_say():
    made = some()
    assert len(made) == 3
    assert made.lengths == [4, 3, 2]
    obs, actions = made.episode(1)
    assert obs["state"].tolist() == [[8, 9], [10, 11], [12, 13]]
    assert torch.equal(actions, -obs["state"])
    assert made.select([2, 0]).rows().tolist() == [7, 8, 0, 1, 2, 3]


def nan_at(step):
    values = np.zeros((9, 2))
    values[step, 1] = np.nan
    return values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ends": [4, 4, 9]}, "episode 1 begins at step 4 and ends at 4; ends must increase"),
        ({"ends": [4, 3, 9]}, "episode 1 begins at step 4 and ends at 3"),
        ({"ends": [0, 9]}, "episode 0 begins at step 0 and ends at 0"),
        ({"ends": np.array([4.0, 9.0])}, "ends are float64 of shape (2,); they must be integers"),
        ({"ends": np.zeros(0, int)}, "at least one"),
        ({"ends": [4, 8]}, "state: holds 9 steps, but the episodes have 8"),
        ({"ends": [4, 10]}, "state: holds 9 steps, but the episodes have 10"),
        (
            {"state": nan_at(5)},
            "state: holds nan at step 5 (episode 1, its step 1), number 1; values must be finite. Fix: drop that episode",
        ),
        ({"state": np.full((9, 2), 1e300)}, "state: holds inf at step 0 (episode 0, its step 0)"),
        ({"actions": nan_at(8)}, "actions: holds nan at step 8 (episode 2, its step 1)"),
        ({"actions": np.zeros((9, 2, 2))}, "actions are torch.float32 of shape (9, 2, 2); they must be float32 (T A)"),
        ({"state": np.array(["a"] * 9)}, "has the dtype <U1, which is not numeric"),
        ({"state": np.array([{}] * 9)}, "has the dtype object, which is not numeric"),
        ({"state": np.zeros((9, 0))}, "a step has the shape (0,)"),
        ({"state": np.float32(3)}, "holds 0 steps"),
    ],
)
def test_faulty_arrays_are_refused_with_the_place(change, words):
    given = {"state": np.zeros((9, 2)), "actions": np.zeros((9, 2)), "ends": ENDS} | change
    with pytest.raises(DataError) as caught:
        Trajectories.of({"state": given["state"]}, given["actions"], given["ends"])
    assert words in str(caught.value)


def test_an_image_that_is_none_later_is_refused():
    image = np.full((9, 4, 4, 3), 7, np.float32)
    made = Trajectories.of({"image": image}, np.zeros((9, 1)), ENDS)
    assert made.obs["image"].dtype == torch.uint8
    parts = [0 * image[:2], image[2:5], image[5:] + 0.5]
    from difftori.data._filling import Field, TensorWriter

    with pytest.raises(DataError, match=r"holds 7.5 at step 5 \(episode 1.*whole numbers from 0 to 255"):
        TensorWriter.of(np.array(ENDS)).fill([Field("file: img", (4, 4, 3), iter(parts))])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"obs": {}}, "no observations"),
        ({"obs": {"a-b": torch.zeros(9, 2)}}, "'a-b' cannot name an entry"),
        ({"obs": {"action": torch.zeros(9, 2)}}, "'action' cannot name an entry"),
        ({"obs": {"state": torch.zeros(8, 2)}}, r"'state' is torch.float32 of shape \(8, 2\)"),
        ({"obs": {"state": torch.zeros(9)}}, r"of shape \(9,\)"),
        ({"obs": {"state": torch.zeros(9, 2).double()}}, "'state' is torch.float64"),
        ({"obs": {"state": torch.zeros(9, 2, device="meta")}}, "is on meta and the actions on cpu"),
        ({"actions": torch.zeros(9)}, r"actions are torch.float32 of shape \(9,\)"),
        ({"spans": torch.zeros(0, 2, dtype=torch.int64)}, "at least one episode"),
        ({"spans": torch.tensor([[0, 4], [4, 10]])}, r"episode 1 has the span \[4, 10\)"),
        ({"spans": torch.tensor([[3, 3]])}, r"episode 0 has the span \[3, 3\)"),
        ({"spans": torch.tensor([[-1, 3]])}, r"episode 0 has the span \[-1"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, words):
    whole = {"obs": {"state": torch.zeros(9, 2)}, "actions": torch.zeros(9, 1), "spans": make_spans(np.array(ENDS))}
    Trajectories(**whole)
    with pytest.raises(DataError, match=words):
        Trajectories(**(whole | change))


def test_a_split_is_by_whole_episodes_seeded_and_shares_the_store():
    made = some(list(range(3, 63, 3)))

    def split(seed, share=0.25):
        return made.split(share, torch.Generator().manual_seed(seed))

    train, validation = split(0)
    assert (len(train), len(validation)) == (15, 5)
    together = torch.cat([train.spans, validation.spans])
    assert sorted(together.tolist()) == made.spans.tolist()
    assert torch.equal(train.spans, train.spans.sort(0).values)
    assert train.obs["state"].data_ptr() == made.obs["state"].data_ptr()
    assert torch.equal(split(0)[1].spans, validation.spans)
    assert any(not torch.equal(split(seed)[1].spans, validation.spans) for seed in range(1, 5))
    assert [len(part) for part in split(0, 0.001)] == [19, 1]
    assert [len(part) for part in split(0, 0.999)] == [1, 19]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_an_impossible_split_is_refused(share):
    with pytest.raises(DataError, match="between 0 and 1"):
        some().split(share, torch.Generator())


def test_one_episode_cannot_be_split():
    with pytest.raises(DataError, match="two episodes or more"):
        some([5]).split(0.5, torch.Generator())


@pytest.mark.parametrize("episodes", [[3], [-1], []])
def test_an_episode_that_is_not_there_is_refused(episodes):
    with pytest.raises(DataError, match="choose from 0 to 2"):
        some().select(episodes)


def test_joined_sets_are_the_episodes_of_both():
    one, other = some().select([2, 0]), some([5])
    joined = Trajectories.join([one, other])
    assert joined.lengths == [2, 4, 5]
    expected = [one.episode(0), one.episode(1), other.episode(0)]
    for number, (obs, actions) in enumerate(expected):
        assert torch.equal(joined.episode(number)[0]["state"], obs["state"])
        assert torch.equal(joined.episode(number)[1], actions)


def test_different_sets_cannot_be_joined():
    with pytest.raises(DataError, match="part 1 has"):
        Trajectories.join([some(), some(more=np.zeros(9))])
    with pytest.raises(DataError, match="nothing to join"):
        Trajectories.join([])


def test_blocks_are_the_steps_of_the_chosen_episodes():
    chosen = some().select([2, 0])
    blocks = list(chosen.blocks(chosen.actions, numbers=4))
    assert [len(block) for block in blocks] == [2, 2, 2]
    assert torch.equal(torch.cat(blocks), chosen.actions[chosen.rows()])
