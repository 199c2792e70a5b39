"""Units of the training data's range, and the box."""

import pytest
import torch

from difftori.errors import BoxError
from difftori.policies._units import Units, whole_plans
from difftori.types import EntrySpec, Moments, TaskSpec
from tests.support.specs import VECTORS


def spec(low: float, high: float, moments: Moments | None) -> TaskSpec:
    return TaskSpec({"state": EntrySpec((1,))}, 1, 1, (low,), (high,), moments=moments)


def moments(low: float, high: float) -> Moments:
    return Moments((low,), (high,), ((low + high) / 2,), (0.1,))


@pytest.mark.parametrize(
    ("box", "data", "margin", "bounds"),
    [
        ((-1.0, 1.0), (-0.5, 0.5), 0.0, (-1.0, 1.0)),
        ((-1.0, 1.0), (-0.5, 0.5), 0.05, (-1.1, 1.1)),
        ((-1.0, 0.6), (-0.5, 0.5), 0.2, (-1.4, 1.2)),
        ((-0.2, 0.1), (-0.5, 0.5), 0.0, (-0.4, 0.2)),
        ((-1.0, 3.0), None, 0.0, (-1.0, 1.0)),
        ((0.0, 0.2), (0.4, 0.6), 0.0, (-3.0, -3.0)),
    ],
    ids=["data", "margin", "margin meets the box", "box within data", "no data", "data beyond the box"],
)
def test_bounds_are_those_of_the_data_and_the_box(box, data, margin, bounds):
    units = Units(spec(*box, None if data is None else moments(*data)), "x", margin=margin)
    assert (units.least.item(), units.greatest.item()) == pytest.approx(bounds)


def test_there_and_back_inside_the_box():
    units = Units(spec(-1.0, 1.0, moments(0.0, 0.5)), "x")
    actions = torch.tensor([[0.0], [0.25], [0.5], [0.9]])
    assert torch.allclose(units.of(actions).flatten(), torch.tensor([-1.0, 0.0, 1.0, 2.6]))
    assert torch.allclose(units.task(units.of(actions)), actions)
    assert units.task(torch.tensor([9.0])) == 1.0


def test_a_box_without_bounds_is_refused():
    with pytest.raises(BoxError, match=r"ibc .* finite"):
        Units(spec(-float("inf"), 1.0, None), "ibc")


def test_what_is_not_executed_repeats_the_ends():
    executed = torch.arange(8.0).reshape(1, 4, 2)
    plans = whole_plans(executed, VECTORS)
    assert plans.shape == (1, 8, 2)
    assert torch.equal(plans[:, VECTORS.present], executed)
    assert torch.equal(plans[0, :, 0], torch.tensor([0.0, 0, 2, 4, 6, 6, 6, 6]))
