"""Small agents, segments to train them on, and one call to act."""

import torch

from difftori.registry import find_agent
from difftori.types import EnvSpec, Segment

STATES = EnvSpec("probe:tiny", (5,), "float32", 2, 100, 1)
PIXELS = EnvSpec("probe:images", (9, 84, 84), "uint8", 2, 100, 1)
TINY = {"width": 16, "encoder_width": 16, "latent_dim": 8, "batch_size": 8, "horizon": 3, "samples": 16, "elites": 4}
FURTHER = {"prior_samples": 2, "channels": 4, "feature_dim": 8}


def build(name: str, spec: EnvSpec = STATES, **settings):
    torch.manual_seed(0)
    kind = find_agent(name)
    return kind(kind.Config(**{**accepted(name, TINY | FURTHER), **settings}), spec)


def accepted(name: str, settings: dict) -> dict:
    """Those of the settings that the agent has."""
    return {key: value for key, value in settings.items() if key in find_agent(name).Config.model_fields}


def randomised(name: str, spec: EnvSpec = STATES, **settings):
    """An agent of random weights throughout: freshly built, its last layers are zeros, and nothing depends on anything."""
    agent = build(name, spec, **{**accepted(name, {"schedule_steps": 0}), **settings})
    g = torch.Generator().manual_seed(7)
    for parameter in agent.parameters():
        parameter.data.normal_(std=0.3, generator=g)
    return agent


def segment(spec: EnvSpec = STATES, *, steps: int = 3, rows: int = 8, seed: int = 0) -> Segment:
    g = torch.Generator().manual_seed(seed)
    shape = (steps + 1, rows, *spec.obs_shape)
    pixels = spec.obs_dtype == "uint8"
    obs = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) if pixels else torch.randn(shape, generator=g)
    return Segment(
        obs,
        2 * torch.rand(steps, rows, spec.action_dim, generator=g) - 1,
        torch.rand(steps, rows, generator=g),
        torch.zeros(steps, rows, dtype=torch.bool),
        torch.ones(steps, rows),
        torch.ones(rows),
        torch.arange(rows),
    )


def act(agent, obs, memory=None, *, first=None, step=30_000, explore=False, seed=0, **options):
    first = torch.ones(len(obs), dtype=torch.bool) if first is None else first
    generator = torch.Generator().manual_seed(seed)
    return agent.act(obs, memory, first=first, step=step, explore=explore, generator=generator, **options)
