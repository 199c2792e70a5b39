"""Diffusion Policy and DP3: what is their own; the rest is in test_every_policy.py."""

import pytest
import torch
from pydantic import ValidationError

from difftori.errors import BoxError, ConfigError
from difftori.il.learner import Learner
from difftori.models.diffusion import DDIM, DDPM
from difftori.policies.bc import BC, BCConfig
from difftori.policies.diffusion import DiffusionConfig, DiffusionPolicy
from difftori.policies.dp3 import DP3, DP3Config
from difftori.policies.normalized import NormalizedPolicy
from difftori.types import TaskSpec, Window, state_obs
from tests.support.specs import CLOUDS, VECTORS, demonstrations, generator, observations

SPEC = TaskSpec.rows(obs_dim=1, action_dim=1, horizon=4, low=(-1.0,), high=(1.0,))
TINY = {"dims": (16, 32), "step_width": 16}
QUICK = {"dims": (32,), "step_width": 16, "blocks": 1, "lr": 1e-2, "warmup": 10, "lr_schedule": "constant"}
"""Settings to learn a toy with in two seconds."""
MODE = 0.6


def two_modes(count: int) -> Window:
    """At one state, all of a plan is −0.6 in half of the demonstrations and +0.6 in the other."""
    side = torch.where(torch.arange(count) % 2 == 0, -MODE, MODE)
    return Window(state_obs(torch.zeros(count, 1)), side[:, None, None].expand(-1, 4, 1), torch.arange(count))


def trained(policy, updates: int):
    """The policy with averaged weights, as the trainer leaves it."""
    learner, draw = Learner(NormalizedPolicy(policy), policy.config), generator()
    for _ in range(updates):
        learner.update(two_modes(64), draw)
    return learner.acting.policy.eval()


@pytest.fixture(scope="module")
def diffusion() -> DiffusionPolicy:
    torch.manual_seed(0)
    return trained(DiffusionPolicy(DiffusionConfig.model_validate({**QUICK, "inference_steps": 10}), SPEC), 200)


def plans(policy, rows: int = 100):
    return policy.act(state_obs(torch.zeros(rows, 1)), generator=generator(5))


def test_two_modes_are_reproduced_and_not_averaged(diffusion):
    """In 10 steps of DDIM; behaviour cloning acts in the middle, where no demonstration is."""
    found = plans(diffusion)[..., 0]
    assert ((found.abs() - MODE).abs() < 0.2).float().mean() > 0.85
    assert 0.25 < (found > 0).float().mean() < 0.75
    assert (found.sign() == found[:, :1].sign()).all(1).float().mean() > 0.9, "a plan stays with its mode"
    torch.manual_seed(0)
    average = plans(trained(BC(BCConfig(hidden=(16,)), SPEC), 50))
    assert average.abs().max() < 0.2


def test_the_same_network_acts_by_ddpm_too(diffusion):
    """All steps, with fresh noise, by the same weights."""
    again = DiffusionPolicy(DiffusionConfig.model_validate(QUICK), SPEC)
    again.load_state_dict(diffusion.state_dict())
    found = plans(again.eval(), 40)[..., 0]
    assert ((found.abs() - MODE).abs() < 0.2).float().mean() > 0.85
    assert 0.15 < (found > 0).float().mean() < 0.85


def test_dp3_learns_the_two_modes_from_a_vector():
    torch.manual_seed(0)
    found = plans(trained(DP3(DP3Config.model_validate(QUICK), SPEC), 120))[..., 0]
    assert ((found.abs() - MODE).abs() < 0.2).float().mean() > 0.9
    assert 0.2 < (found > 0).float().mean() < 0.8


@pytest.mark.parametrize("kind", [DiffusionPolicy, DP3])
def test_draws_differ_and_so_do_those_of_equal_rows(kind):
    policy = kind(kind.Config(noise_steps=10, **{**TINY, "inference_steps": 2}), VECTORS)
    assert kind.STOCHASTIC
    obs = {name: values[:1].expand(3, *values.shape[1:]) for name, values in observations(VECTORS, 1).items()}
    first, second = (policy.act(obs, generator=generator(seed)) for seed in (1, 2))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[0], first[1])


def test_actions_are_in_the_tasks_units_within_what_was_measured():
    """Clipped to the range of the training data, ±1 here, which is narrower than the box."""
    wide = TaskSpec(**{**vars(VECTORS), "low": (-5.0, -5.0), "high": (5.0, 5.0)})
    policy = NormalizedPolicy(DP3(DP3Config(noise_steps=10, **TINY), wide))
    with torch.no_grad():
        for value in policy.policy.parameters():
            value.mul_(10)
    found = policy.act(observations(wide, 8), generator=generator())
    assert found.abs().max() == 1.0


def test_an_infinite_box_needs_measured_actions():
    unbounded = {"low": (-float("inf"),) * 2, "high": (float("inf"),) * 2}
    NormalizedPolicy(DP3(DP3Config(**TINY), TaskSpec(**{**vars(VECTORS), **unbounded})))
    with pytest.raises(BoxError, match="finite"):
        NormalizedPolicy(DP3(DP3Config(**TINY), TaskSpec(**{**vars(VECTORS), **unbounded, "moments": None})))


def test_defaults_are_those_of_the_sources():
    chi, ze = DiffusionConfig(), DP3Config()
    for config in (chi, ze):
        assert (config.optimizer, config.lr, config.beta1, config.beta2) == ("adamw", 1e-4, 0.95, 0.999)
        assert (config.weight_decay, config.lr_schedule, config.warmup, config.ema) == (1e-6, "cosine", 500, 0.9999)
        assert (config.dims, config.step_width, config.noise_steps) == ((512, 1024, 2048), 128, 100)
        assert (config.clip_norm, config.images.width, config.images.keypoints) == (0, 64, 32)
    assert (chi.batch_size, chi.epochs, chi.prediction, chi.inference_steps) == (64, 3050, "epsilon", None)
    assert (ze.batch_size, ze.epochs, ze.prediction, ze.inference_steps) == (128, 3000, "sample", 10)
    assert DP3.WINDOW == (2, 4, 3)
    assert DiffusionPolicy.WINDOW is None, "the environment's, which is (2, 16, 8) unless it says otherwise"


def test_presets_hold_for_what_is_not_given():
    assert DP3Config(preset="simple").dims == (128, 256, 384)
    assert DP3Config(preset="simple").blocks == 1
    assert DP3Config(preset="simple", blocks=2).blocks == 2
    low = DiffusionConfig(preset="lowdim")
    assert (low.dims, low.step_width, low.batch_size, low.epochs) == ((256, 512, 1024), 256, 256, 5000)
    with pytest.raises(ValidationError, match="preset 'tiny' is unknown"):
        DiffusionConfig(preset="tiny")


def test_the_sampler_follows_from_the_steps():
    sampler = {n: DP3(DP3Config(inference_steps=n, **TINY), CLOUDS).model.sampler for n in (None, 20)}
    assert sampler == {None: DDPM(), 20: DDIM(20)}
    with pytest.raises(ConfigError, match=r"settings\.inference_steps: 60"):
        DP3(DP3Config(inference_steps=60, **TINY), CLOUDS)


@pytest.mark.parametrize("dims", [(16, 12), (0,)])
def test_channels_that_cannot_be_grouped_are_refused_with_the_settings(dims):
    with pytest.raises(ValidationError, match="dims"):
        DiffusionConfig(dims=dims)


def test_the_cloud_is_looked_at():
    torch.manual_seed(0)
    policy = DP3(DP3Config(noise_steps=10, **TINY), CLOUDS)
    batch = demonstrations(CLOUDS, 4)
    policy.loss(batch, generator=generator())[0].backward()
    cloud = [p for name, p in policy.named_parameters() if "obs_point_cloud" in name]
    assert cloud
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cloud)
