"""A small DiffTORI policy on a constant base."""

import torch

from difftori.policies.difftori import DiffTORI, DiffTORIConfig
from difftori.policies.refiner import FunctionBase
from difftori.types import Plans, TaskSpec, WindowObs
from tests.support.specs import VECTORS

SMALL = {"hidden": (16,), "latent_dim": 8, "cvae_dim": 4}


def constant_base(obs: WindowObs) -> Plans:
    """The same plan for every observation."""
    rows = len(next(iter(obs.values())))
    return torch.linspace(-0.5, 0.5, VECTORS.horizon)[None, :, None].expand(rows, -1, VECTORS.action_dim).clone()


def refiner(spec: TaskSpec = VECTORS, **settings) -> DiffTORI:
    torch.manual_seed(0)
    return DiffTORI(DiffTORIConfig.model_validate({**SMALL, **settings}), spec, FunctionBase(constant_base))


def enlarged(policy: DiffTORI) -> DiffTORI:
    """Larger weights, so that the solve goes somewhere."""
    with torch.no_grad():
        for parameter in (*policy.score.parameters(), *policy.encoder.parameters()):
            parameter.mul_(2.0)
        policy.score[-1].weight.mul_(10.0)
    return policy
