"""Base of Tables 3 and 5: ManiSkill's tasks and demonstrations, a PointNet trained by behaviour cloning, and refiners on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from difftori.envs.maniskill import PLANNED, full_name
from difftori.errors import ConfigError
from difftori.experiments.il_report import Published, run_refinement
from difftori.experiments.il_study import Case, ILStudy, shortfalls
from difftori.experiments.study import Method
from difftori.paper.numbers import labelled_numbers, paper_numbers
from difftori.policies.difftori import DEFAULT_NOISE

TABLE = "table3_and_5_maniskill_success_rate"
PAPER_TASKS = tuple(dict.fromkeys(row.task for row in paper_numbers(TABLE)))
"""The paper's nine tasks."""
FULL_UPDATES, FULL_EPISODES, FULL_DEMONSTRATIONS = 50_000, 100, 1000
"""ManiSkill2 publishes 1000 demonstrations of PickCube; the paper does not say how many it uses."""
BASES: dict[str, tuple[str, dict[str, object]]] = {
    "points": ("bc-pointnet", {}),
    "state": ("bc", {"hidden": (256, 256), "optimizer": "adamw", "lr_schedule": "cosine", "batch_size": 64}),
}
"""The base policy and its settings for each observation type."""
SMALL = {"point_layers": (32, 64, 128), "batch_size": 64}
"""Settings of the PointNet for CPUs: a seventh of the arithmetic per cloud, a quarter of the clouds."""


class ManiskillConfig(ILStudy):
    """Options of the studies on ManiSkill."""

    tasks: tuple[str, ...] = Field(default=PAPER_TASKS, min_length=1)
    """Tasks of ManiSkill (default: the paper's nine, all of which but PickCube need assets or ManiSkill 2)."""
    demos: Path = Path("demos")
    """Directory of the demonstrations. Those of PickCube, PushCube, StackCube and PegInsertionSide are collected if they are missing;
    those of other tasks are at `TASK/*.h5` in it."""
    demonstrations: int = Field(default=FULL_DEMONSTRATIONS, ge=2)
    """Number of demonstrations to collect for each task and seed."""
    obs: Literal["points", "state"] = "points"
    """Observation type. The base policy is the paper's PointNet on point clouds, or a multilayer perceptron on states."""
    sizes: Literal["paper", "small"] = "paper"
    """Sizes of the PointNet and its batches; `small` is for CPUs. The perceptron on states has one size."""
    updates: int = Field(default=FULL_UPDATES, ge=1)
    """Number of updates of every training, for base policies and refiners."""
    episodes: int = Field(default=FULL_EPISODES, ge=1)
    """Number of evaluation episodes of every policy, with the same seeds."""

    @field_validator("tasks")
    @classmethod
    def _named(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(dict.fromkeys(full_name(task) for task in tasks))
        except ConfigError as error:
            raise ValueError(error.faults[0]) from error


def run_tables(
    config: ManiskillConfig,
    methods: Sequence[Method],
    compared: Sequence[tuple[str, str]],
    *,
    study: str,
    title: str,
    paper: Mapping[str, str],
    further: Mapping[str, bool],
) -> None:
    """Run the missing runs, and write `out/<study>`.

    `paper` maps labels of methods to the paper's names. `further` are the study's own reasons that make it partial.
    """
    count = len(set(config.tasks) & set(PAPER_TASKS))
    small = config.sizes == "small" and config.obs == "points"
    checks = {
        "states instead of point clouds": config.obs != "points",
        "small networks": small,
        **shortfalls(config, updates=FULL_UPDATES, episodes=FULL_EPISODES),
        f"{config.demonstrations} of {FULL_DEMONSTRATIONS} demonstrations": config.demonstrations < FULL_DEMONSTRATIONS,
        f"{count} of {len(PAPER_TASKS)} tasks": count < len(PAPER_TASKS),
        **further,
    }
    budget = f"{config.obs}{'-small' if small else ''}-{config.updates}-{config.demonstrations}-demos"
    run_refinement(
        config,
        [_case(config, task) for task in config.tasks],
        methods,
        compared,
        study=study,
        title=title,
        reasons=[reason for reason, holds in checks.items() if holds],
        budget=f"{'+'.join(config.tasks)}-{budget}",
        published=[Published(row.task, label, row.mean, row.std) for row, label in labelled_numbers(TABLE, paper)],
        runs=f"maniskill/{budget}",
    )


def base(config: ManiskillConfig) -> Method:
    """Return the base policy at the study's size."""
    policy, settings = BASES[config.obs]
    return Method("base", policy, SMALL if policy == "bc-pointnet" and config.sizes == "small" else settings)


def refiner(config: ManiskillConfig, label: str, **settings: object) -> Method:
    """Return DiffTORI on the base policy. On the small base, noise on its actions helps (study `base-noise`)."""
    noise = {"base_noise": DEFAULT_NOISE} if config.obs == "state" else {}
    return Method(label, "difftori-il", {**noise, **settings}, base="base")


def _case(config: ManiskillConfig, task: str) -> Case:
    """Return the environment and the demonstrations of a task."""
    env = f"maniskill:{task}"
    if task in PLANNED:
        place = f"{{demos}}/{config.obs}-{config.demonstrations}/maniskill.{task}-{{seed}}.zarr"
        return Case(env, config.obs, place, config.demonstrations)
    return Case(
        env, config.obs, str(_recorded(config.demos / task, "pointcloud" if config.obs == "points" else "state"))
    )


def _recorded(folder: Path, kind: str) -> Path:
    """Return the path of ManiSkill's file with these observations, by its name. If no name contains them, the first file."""
    found = sorted(folder.glob("*.h5"))
    named = [path for path in found if f".{kind}." in path.name]
    return (named or found or [folder / "trajectory.h5"])[0]
