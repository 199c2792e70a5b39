"""Figure 4: one state, two latent samples, two landscapes of the learned objective, and the iterates of the solve in each.

Requires a finished run of `difftori-il` with the variational autoencoder. The figure shows the plane through the shared start
and the two solutions; the area outside of the action box is white.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from torch import Tensor

from difftori.errors import ConfigError
from difftori.experiments.plots import MARKERS, PALETTE, footnote, save_svg, style
from difftori.il.env_task import TEST_SEED, EnvEvaluator
from difftori.il.weights import load_policy
from difftori.policies.difftori import DiffTORI
from difftori.policies.normalized import NormalizedPolicy
from difftori.registry import resolve_env
from difftori.rollout import named
from difftori.runs.run import seeded
from difftori.solver import Detached
from difftori.types import WindowObs

_GRID = 61


class Config(BaseModel):
    """Landscapes of the learned objective for two latent samples at one state, and the iterates of the solver (Figure 4)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: Path
    """Run directory of a finished run of `difftori-il` with `--cvae-dim`, in an environment."""
    episode: int = Field(default=TEST_SEED, ge=0)
    """Random seed of the episode whose first state is shown."""
    samples: int = Field(default=0, ge=0)
    """Random seed of the two latent samples."""
    out: Path = Path("results/figure4")
    """Directory of the figure."""


def run(config: Config) -> None:
    """Write `out/figure4.svg`. Raises ConfigError for a run of another policy, or one without latent samples."""
    policy, of_run = load_policy(config.run, "last")
    network = policy.policy
    if not isinstance(network, DiffTORI) or network.settings.cvae_dim == 0 or of_run.demos is None:
        raise ConfigError(
            [f"run: {config.run} is not a run of difftori-il with --cvae-dim in an environment. Fix: train one first"]
        )
    evaluator = EnvEvaluator(resolve_env(of_run.env), of_run.obs, env_options=of_run.env_options or ())
    env = evaluator.open(1)
    try:
        first = named(env.reset(seed=[config.episode])[0])
    finally:
        env.close()
    n_obs_steps = policy.spec.n_obs_steps
    obs: WindowObs = {name: torch.from_numpy(np.repeat(v[:, None], n_obs_steps, 1)) for name, v in first.items()}
    panels = landscapes(policy, obs, seed=config.samples)
    figure = draw(panels, f"{of_run.env}, first state of episode {config.episode}, run {config.run}")
    save_svg(figure, config.out / "figure4.svg")
    Console().print(f"The figure is {config.out / 'figure4.svg'}.", soft_wrap=True)


@dataclass(frozen=True)
class Landscape:
    """The objective over the plane for one latent sample: `axis` (g), the coordinates of both sides; `values` (g g), NaN outside of
    the box; `path` (k 2), the iterates from the shared start in the plane's coordinates; `rise`, the increase of the
    objective along it.
    """

    axis: Tensor
    values: Tensor
    path: Tensor
    rise: float


@torch.no_grad()
def landscapes(refined: NormalizedPolicy, obs: WindowObs, *, seed: int) -> list[Landscape]:
    """Solve from the same start at one observation (1 O …) for two samples z̃ ~ N(0, I), and return both landscapes."""
    generator = seeded(seed, "figure 4")
    policy = refined.policy
    assert isinstance(policy, DiffTORI)
    whole = None if refined.base is None else refined.base_actions(obs, generator=generator)
    inputs, base = refined.inputs(obs, whole)
    base = None if base is None else policy.planned_base(base)
    start = policy.guess(inputs, base, generator)
    state = policy.encode(inputs)
    samples = torch.randn(2, 1, policy.settings.cvae_dim, generator=generator)
    paths = []
    for sample in samples:
        plan = policy.plan(state, sample, start, base, Detached(), history=True)
        assert plan.solution.history is not None
        paths.append(plan.solution.history.x[:, 0])
    origin = paths[0][0]
    frame = _plane(paths[0][-1] - origin, paths[1][-1] - origin)
    flat = [(path - origin) @ frame.T for path in paths]
    reach = 1.5 * max(path.abs().amax().item() for path in flat) + 1e-3
    axis = torch.linspace(-reach, reach, _GRID)
    across, up = torch.meshgrid(axis, axis, indexing="xy")
    points = origin + torch.stack((across.flatten(), up.flatten()), 1) @ frame
    inside = (points.abs() <= 1 + 1e-6).all(1)
    found = []
    for sample, path in zip(samples, flat, strict=True):

        def value(x: Tensor, sample: Tensor = sample) -> Tensor:
            rows = len(x)
            bases = None if base is None else base.expand(rows, -1, -1)
            return -policy.objective(state.expand(rows, -1), sample.expand(rows, -1), bases).cost(x)

        values = torch.where(inside, value(points), torch.nan).reshape(_GRID, _GRID)
        ends = value(torch.stack((origin, origin + path[-1] @ frame)))
        found.append(Landscape(axis, values, path, float(ends[1] - ends[0])))
    return found


def _plane(one: Tensor, other: Tensor) -> Tensor:
    """Return two orthonormal directions (2 n) that span both moves. The second one is arbitrary if the moves are parallel."""
    generator = torch.Generator().manual_seed(0)
    first = one if one.norm() > 1e-8 else torch.randn(one.shape, generator=generator)
    first = first / first.norm()
    rest = other - (other @ first) * first
    if rest.norm() < 1e-6:
        rest = torch.randn(one.shape, generator=generator)
        rest = rest - (rest @ first) * first
    return torch.stack((first, rest / rest.norm()))


def draw(panels: list[Landscape], caption: str) -> Figure:
    """Plot contours and iterates of both landscapes, each with its own levels."""
    with style():
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        for index, (axis, panel) in enumerate(
            zip(figure.subplots(1, 2, sharex=True, sharey=True), panels, strict=True)
        ):
            side = panel.axis.numpy()
            filled = axis.contourf(side, side, np.ma.masked_invalid(panel.values.numpy()), levels=20, cmap="viridis")
            figure.colorbar(filled, ax=axis, label="objective")
            path = panel.path.numpy()
            axis.plot(path[:, 0], path[:, 1], marker=MARKERS[1], markersize=3, color=PALETTE[2], linewidth=1.2)
            axis.plot(0, 0, marker="*", markersize=11, color=PALETTE[4], linestyle="none")
            axis.set(
                title=f"latent sample {index + 1}, objective +{panel.rise:.3g}",
                xlabel="first direction",
                aspect="equal",
            )
        figure.axes[0].set_ylabel("second direction")
        footnote(figure, f"{caption}; star: the shared start; units: the action box is [−1, 1]")
    return figure
