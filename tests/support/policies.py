"""A small DiffTORI policy and a constant base."""

import torch

from difftori.policies.difftori import DiffTORI, DiffTORIConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.types import Plans, TaskSpec, Window, WindowObs
from tests.support.specs import VECTORS, generator, with_base

SMALL = {"hidden": (16,), "latent_dim": 8, "cvae_dim": 4}


def constant_base(obs: WindowObs) -> Plans:
    """The same plan for every observation."""
    rows = len(next(iter(obs.values())))
    return torch.linspace(-0.5, 0.5, VECTORS.horizon)[None, :, None].expand(rows, -1, VECTORS.action_dim).clone()


def refiner(spec: TaskSpec = VECTORS, **settings) -> DiffTORI:
    torch.manual_seed(0)
    return DiffTORI(DiffTORIConfig.model_validate({**SMALL, **settings}), spec)


def enlarged(policy: DiffTORI) -> DiffTORI:
    """Larger weights, so that the solve goes somewhere."""
    with torch.no_grad():
        for parameter in (*policy.score.parameters(), *policy.encoder.parameters()):
            parameter.mul_(2.0)
        policy.score[-1].weight.mul_(10.0)
    return policy


def loss_of(policy: DiffTORI, batch: Window, seed: int = 0):
    """The loss and metrics of a batch, with the constant base."""
    refined = NormalizedPolicy(policy, constant_base)
    return refined.loss(with_base(refined, batch), generator=generator(seed))


def seen(policy: DiffTORI, obs: WindowObs) -> WindowObs:
    """Observations as the policy sees them."""
    return NormalizedPolicy(policy, constant_base).inputs(obs, None)[0]
