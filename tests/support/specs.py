"""Tasks to test policies on: their specifications, observations and small demonstrations."""

from dataclasses import replace

import torch

from difftori.interfaces import Policy
from difftori.models.images import Images
from difftori.policies.bc import BC, BCConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.policies.refiner import Refiner
from difftori.types import EntrySpec, Moments, TaskSpec, Window, WindowObs

ROWS = TaskSpec.rows(obs_dim=3, action_dim=1, horizon=6, low=(-2.0,), high=(2.0,))
"""The pendulum's sizes with fewer steps: policies that know the task's dynamics learn on it too."""


def _moments(size: int, reach: float = 1.0) -> Moments:
    return Moments((-reach,) * size, (reach,) * size, (0.0,) * size, (0.5 * reach,) * size)


VECTORS = TaskSpec(
    obs={"state": EntrySpec((3,), moments=_moments(3, 2.0)), "agent_pos": EntrySpec((2,), moments=_moments(2))},
    action_dim=2,
    horizon=8,
    low=(-1.0, -1.0),
    high=(1.0, 1.0),
    n_obs_steps=2,
    n_action_steps=4,
    moments=_moments(2),
)
CLOUDS = TaskSpec(
    obs={"point_cloud": EntrySpec((16, 3), moments=_moments(3)), "agent_pos": EntrySpec((2,), moments=_moments(2))},
    action_dim=2,
    horizon=4,
    low=(-1.0, -1.0),
    high=(1.0, 1.0),
    n_obs_steps=2,
    n_action_steps=3,
    moments=_moments(2),
)
IMAGES = TaskSpec(
    obs={"agent_pos": EntrySpec((2,), moments=_moments(2)), "image": EntrySpec((40, 37, 3), "uint8")},
    action_dim=2,
    horizon=4,
    low=(-1.0, -1.0),
    high=(1.0, 1.0),
    n_obs_steps=2,
    n_action_steps=3,
    moments=_moments(2),
)
WITHIN = {
    "vectors": replace(VECTORS, low=(-3.0, -1.5), high=(1.2, 4.0)),
    "clouds": replace(CLOUDS, low=(-3.0, -1.5), high=(1.2, 4.0)),
}
"""Data in the middle of a wider box: the units of the data are not those of the box."""
SHIFT, SCALE = (0.5, -2.0), (3.0, 0.25)
OBS_SHIFT, OBS_SCALE = 7.0, 0.1


def in_other_units(spec: TaskSpec) -> TaskSpec:
    """The same task with actions times `SCALE` plus `SHIFT`, and observations times `OBS_SCALE` plus `OBS_SHIFT`."""

    def moved(m: Moments | None, scale: tuple[float, ...], shift: tuple[float, ...]) -> Moments | None:
        if m is None:
            return None
        low, high, mean = (
            tuple(v * a + b for v, a, b in zip(part, scale, shift, strict=True)) for part in (m.low, m.high, m.mean)
        )
        return Moments(low, high, mean, tuple(v * a for v, a in zip(m.std, scale, strict=True)))

    obs = {
        name: replace(
            entry, moments=moved(entry.moments, (OBS_SCALE,) * entry.shape[-1], (OBS_SHIFT,) * entry.shape[-1])
        )
        for name, entry in spec.obs.items()
    }
    low, high = (tuple(v * a + b for v, a, b in zip(part, SCALE, SHIFT, strict=True)) for part in (spec.low, spec.high))
    return replace(spec, obs=obs, low=low, high=high, moments=moved(spec.moments, SCALE, SHIFT))


SPECS = {"rows": ROWS, "vectors": VECTORS, "clouds": CLOUDS, "images": IMAGES}
TINY = Images(width=16, keypoints=4)
"""A network for images that is quick to make and to train."""
_UNET = {"dims": (16, 32), "step_width": 16, "noise_steps": 6, "images": TINY}
SMALL: dict[str, dict] = {
    "bc": {"images": TINY},
    "difftori-il": {"images": TINY},
    "diffusion": _UNET,
    "dp3": {**_UNET, "inference_steps": 2},
    "residual": {"images": TINY},
    "bc-pointnet": {"point_layers": (16, 32), "hidden": (32,)},
    "bc-rnn-gmm": {"preset": "small", "hidden": 32, "images": TINY},
    "ibc": {"preset": "small", "hidden": (64, 64), "num_negatives": 32, "samples": 64, "images": TINY},
    "ibc-base": {"preset": "small", "hidden": (64, 64), "num_negatives": 32, "samples": 64, "images": TINY},
}
"""Settings that make a policy small enough to be tested often."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observations(spec: TaskSpec, rows: int, seed: int = 1) -> WindowObs:
    """Uniform in ±1, pixels in 0 … 255; of `ROWS`, pendulum states: on the unit circle, with a velocity."""
    draw = generator(seed)
    if spec is ROWS:
        angle, velocity = 3 * torch.rand(2, rows, generator=draw) - 1.5
        return {"state": torch.stack((angle.cos(), angle.sin(), velocity), dim=1)[:, None]}
    drawn = {name: torch.rand(rows, spec.n_obs_steps, *entry.shape, generator=draw) for name, entry in spec.obs.items()}
    return {
        name: (256 * values).to(torch.uint8) if spec.obs[name].dtype == "uint8" else 2 * values - 1
        for name, values in drawn.items()
    }


def demonstrations(spec: TaskSpec, rows: int) -> Window:
    """What is done follows from the second number of the first entry, ever less."""
    obs = observations(spec, rows)
    seen = next(iter(obs.values())).flatten(1)[:, 1]
    fading = torch.linspace(0.75, 0.1, spec.horizon)
    reach = torch.tensor(spec.high)
    return Window(obs, -seen[:, None, None] * fading[None, :, None] * reach, torch.arange(rows))


def with_base(policy: NormalizedPolicy, batch: Window) -> Window:
    """The batch with one sample of the base's actions, if the policy has a base."""
    if policy.base is None:
        return batch
    return replace(batch, base=policy.base_actions(batch.obs, generator=generator()).unsqueeze(1))


def build(kind: type[Policy], spec: TaskSpec, **settings) -> NormalizedPolicy:
    """A policy with its defaults; a refiner of windows on an untrained base."""
    torch.manual_seed(0)
    if not issubclass(kind, Refiner):
        return NormalizedPolicy(kind(kind.Config.model_validate(settings), spec))
    if spec is ROWS and kind.OR_ELSE:
        return NormalizedPolicy(kind(kind.Config.model_validate({"preset": "pendulum", **settings}), spec))
    base = NormalizedPolicy(BC(BCConfig(hidden=(8,), images=TINY), spec).eval())
    return NormalizedPolicy(kind(kind.Config.model_validate(settings), spec), base)
