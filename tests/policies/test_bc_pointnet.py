"""Cloning from clouds: what is its own; the rest is in test_every_policy.py."""

from dataclasses import replace

import pytest
import torch

from difftori.errors import ShapeError
from difftori.policies.bc_pointnet import BCPointNet, BCPointNetConfig, PointFeatures
from difftori.policies.normalized import NormalizedPolicy
from difftori.types import EntrySpec, TaskSpec
from tests.support.specs import CLOUDS, VECTORS, generator, observations


def policy(spec: TaskSpec = CLOUDS) -> BCPointNet:
    torch.manual_seed(0)
    return BCPointNet(BCPointNetConfig(point_layers=(16, 32), hidden=(32,)), spec)


def test_the_order_of_points_and_copies_of_them_do_not_matter():
    network, clouds = PointFeatures(6, (16, 32)), torch.randn(2, 3, 20, 6)
    features = network(clouds)
    assert features.shape == (2, 3, 32)
    assert torch.equal(features, network(clouds[:, :, torch.randperm(20)]))
    assert torch.equal(features, network(torch.cat((clouds, clouds[:, :, :5]), 2)))


def test_colours_are_further_columns():
    spec = replace(CLOUDS, obs={**CLOUDS.obs, "point_cloud": EntrySpec((16, 6))})
    learner, obs = NormalizedPolicy(policy(spec)), observations(spec, 2)
    recoloured = {**obs, "point_cloud": torch.cat((obs["point_cloud"][..., :3], -obs["point_cloud"][..., 3:]), -1)}
    first, second = (learner.act(seen, generator=generator()) for seen in (obs, recoloured))
    assert first.shape == (2, 4, 2)
    assert not torch.equal(first, second)


def test_vectors_are_seen_too():
    obs = observations(CLOUDS, 2)
    moved = {**obs, "agent_pos": obs["agent_pos"] + 0.1}
    assert not torch.equal(*(policy().act(seen, generator=generator()) for seen in (obs, moved)))


def test_it_begins_in_the_middle_of_the_box():
    spec = replace(CLOUDS, low=(-1.0, 0.0), high=(1.0, 4.0))
    assert torch.allclose(policy(spec).predict(observations(spec, 5)), torch.tensor([0.0, 2.0]), atol=0.1)


def test_the_executed_actions_are_learned_and_the_others_repeat_them():
    plans = NormalizedPolicy(policy()).act(observations(CLOUDS, 2), generator=generator())
    assert torch.equal(plans[:, 0], plans[:, 1])
    assert policy().net[-1].out_features == CLOUDS.n_action_steps * CLOUDS.action_dim


@pytest.mark.parametrize("more", [{}, {"point_cloud": EntrySpec((16, 3)), "image": EntrySpec((8, 8, 3), "uint8")}])
def test_tasks_without_clouds_or_with_images_are_refused(more):
    with pytest.raises(ShapeError, match=r"point cloud .*Fix: choose another --obs"):
        policy(replace(VECTORS, obs={**VECTORS.obs, **more}))


def test_defaults_are_those_of_the_source():
    config = BCPointNetConfig()
    assert (config.point_layers, config.hidden) == ((64, 128, 512), (256,))
    assert (config.optimizer, config.lr, config.batch_size) == ("adam", 3e-4, 256)
