"""Table 1: MetaWorld, a base policy, the base with a residual, and the base refined by DiffTORI.

The paper's base is DP3 on point clouds. `--base bc --obs state` and `--base dp3-simple` are for CPUs. They are labelled
partial, because the paper's numbers in the table are of another base policy. With `--reference`, DiffTORI is also run with
the settings of the authors' release.
"""

from typing import Literal

from pydantic import Field

from difftori.envs.metaworld import PAPER_TASKS
from difftori.experiments.il_report import Published, run_refinement
from difftori.experiments.il_study import Case, ILStudy, shortfalls
from difftori.experiments.paper.base_noise import RESIDUAL_NOISE
from difftori.experiments.study import Method
from difftori.paper.numbers import labelled_numbers
from difftori.policies.difftori import DEFAULT_NOISE

FULL_UPDATES, FULL_EPISODES, DEMOS = 15_000, 50, 10
BASES: dict[str, tuple[str, dict[str, object]]] = {
    "dp3": ("dp3", {}),
    "dp3-simple": ("dp3", {"preset": "simple"}),
    "bc": ("bc", {"hidden": (256, 256), "optimizer": "adamw", "lr_schedule": "cosine", "batch_size": 64}),
}
PAPER = {"base": "dp3", "residual": "residual+dp3", "DiffTORI": "difftori+dp3"}


class Config(ILStudy):
    """MetaWorld: a base policy, a residual on it, DiffTORI on it (Table 1).

    The defaults are the full study; a smaller one is labelled `partial` in every output.
    """

    tasks: tuple[str, ...] = Field(default=PAPER_TASKS, min_length=1)
    """Tasks of MetaWorld (default: the paper's 22)."""
    obs: Literal["points", "state"] = "points"
    """Observation type; the paper uses point clouds."""
    base: Literal["dp3", "dp3-simple", "bc"] = "dp3"
    """Base policy to refine; the paper uses DP3."""
    updates: int = Field(default=FULL_UPDATES, ge=1)
    """Number of updates of every training, for base policies and refiners."""
    controls: bool = True
    """Also run the base trained twice as long, and the residual with noise σ = 0.5 on the base's action, the best in `base-noise`."""
    reference: bool = False
    """Also run DiffTORI with the solver settings of the authors' release."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/table1`."""
    policy, settings = BASES[config.base]
    methods = [Method("base", policy, settings)]
    methods += [Method("base twice as long", policy, settings, updates=2)] if config.controls else []
    methods += [Method("residual", "residual", base="base")]
    methods += (
        [Method("residual, noise", "residual", {"base_noise": RESIDUAL_NOISE}, base="base")] if config.controls else []
    )
    noise = {"base_noise": DEFAULT_NOISE} if config.base == "bc" else {}
    methods += [Method("DiffTORI", "difftori-il", noise, base="base")]
    methods += (
        [Method("DiffTORI, release", "difftori-il", {"preset": "reference"}, base="base")] if config.reference else []
    )
    compared = [("DiffTORI", method.label) for method in methods if not method.label.startswith("DiffTORI")]
    compared += [("residual", "base")]
    run_refinement(
        config,
        [_case(task, config.obs) for task in config.tasks],
        methods,
        compared,
        study="table1",
        title="Table 1: MetaWorld",
        reasons=_reasons(config),
        budget=f"{config.obs}-{config.base}-{config.updates}",
        published=[
            Published(p.task, label, p.mean / 100, None if p.std is None else p.std / 100)
            for p, label in labelled_numbers("table1_metaworld_success_percent", PAPER)
        ],
    )


def _case(task: str, obs: str) -> Case:
    data = f"{{demos}}/{'' if obs == 'state' else 'points/'}metaworld.{task}-{{seed}}.zarr"
    return Case(f"metaworld:{task}", obs, data, collect=DEMOS)


def _reasons(config: Config) -> list[str]:
    checks = {
        f"base {config.base} instead of dp3": config.base != "dp3",
        "states instead of point clouds": config.obs != "points",
        **shortfalls(config, updates=FULL_UPDATES, episodes=FULL_EPISODES),
        f"{len(set(config.tasks))} of {len(PAPER_TASKS)} tasks": not set(config.tasks) >= set(PAPER_TASKS),
    }
    return [reason for reason, holds in checks.items() if holds]
