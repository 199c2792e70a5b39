"""Units of the training data's range, and the box."""

import pytest
import torch

from difftori.errors import BoxError
from difftori.interfaces import Policy, PolicyConfig
from difftori.policies._units import normalized_bounds
from difftori.policies.bc_pointnet import BCPointNet, BCPointNetConfig
from difftori.policies.ibc import IBC, IBCConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.types import EntrySpec, Moments, TaskSpec, Window
from tests.support.specs import CLOUDS, generator, observations


def spec(low: float, high: float, moments: Moments | None) -> TaskSpec:
    return TaskSpec({"state": EntrySpec((1,))}, 1, 1, (low,), (high,), moments=moments)


def moments(low: float, high: float) -> Moments:
    return Moments((low,), (high,), ((low + high) / 2,), (0.1,))


@pytest.mark.parametrize(
    ("box", "data", "margin", "bounds"),
    [
        ((-1.0, 1.0), (-0.5, 0.5), 0.0, (-1.0, 1.0)),
        ((-1.0, 1.0), (-0.5, 0.5), 0.05, (-1.1, 1.1)),
        ((-1.0, 0.6), (-0.5, 0.5), 0.2, (-1.4, 1.4)),
        ((-1.0, 1.0), (-1.0, 1.0), 0.05, (-1.1, 1.1)),
        ((-0.2, 0.1), (-0.5, 0.5), 0.0, (-0.4, 0.2)),
        ((-1.0, 3.0), None, 0.0, (-1.0, 1.0)),
        ((0.0, 0.2), (0.4, 0.6), 0.0, (-3.0, -3.0)),
    ],
    ids=[
        "data",
        "margin",
        "margin exceeds the box",
        "box of the data",
        "box within data",
        "no data",
        "data beyond the box",
    ],
)
def test_bounds_are_those_of_the_data_and_the_box(box, data, margin, bounds):
    low, high = normalized_bounds(spec(*box, None if data is None else moments(*data)), margin=margin)
    assert (low.item(), high.item()) == pytest.approx(bounds)


class Copy(Policy):
    """Sees and returns the actions it is given, to look at what the wrapper hands over."""

    name = "copy"
    Config = PolicyConfig

    def __init__(self, spec: TaskSpec, *actions: float):
        super().__init__(PolicyConfig(), spec)
        self.actions = torch.nn.Parameter(torch.tensor(actions), requires_grad=False)

    def loss(self, batch, *, generator):
        self.batch = batch
        return batch.actions.sum(), {}

    def act(self, obs, *, generator):
        return self.actions[:, None, None]


def test_there_and_back_inside_the_box():
    task = spec(-1.0, 1.0, moments(0.0, 0.5))
    policy = NormalizedPolicy(Copy(task, -1.0, 0.0, 1.0, 2.6, 99.0))
    actions, obs = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])[:, None, None], {"state": torch.zeros(5, 1, 1)}
    policy.loss(Window(obs, actions, torch.arange(5)), generator=generator())
    assert torch.allclose(policy.policy.batch.actions.flatten(), torch.tensor([-1.0, 0.0, 1.0, 2.6, 3.0]))
    assert torch.allclose(policy.act(obs, generator=generator()), actions)


def test_a_box_without_bounds_is_refused():
    with pytest.raises(BoxError, match=r"ibc .* finite"):
        NormalizedPolicy(IBC(IBCConfig(preset="small"), spec(-float("inf"), 1.0, None)))


def test_what_is_not_executed_repeats_the_ends():
    policy = NormalizedPolicy(BCPointNet(BCPointNetConfig(point_layers=(8,), hidden=(8,)), CLOUDS))
    obs = observations(CLOUDS, 1)
    executed = policy.policy.predict(policy.inputs(obs, None)[0])
    plans = policy.act(obs, generator=generator())
    assert plans.shape == (1, 4, 2)
    assert torch.equal(plans[:, CLOUDS.present], executed)
    assert torch.equal(plans[:, :1], executed[:, :1])
