"""Base of Tables 2, 4, 6 and 7: the tasks of Robomimic and Push-T, their demonstrations, the methods, and the runs.

A task's name says whose demonstrations it has:

    pusht                      206 human demonstrations, downloaded
    square-ph, square-mh       robomimic's data sets of proficient and of several operators, provided by the user
    square                     demonstrations of the scripted expert, collected if they are missing
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from difftori.envs.robomimic import TASKS as ROBOMIMIC
from difftori.errors import ConfigError
from difftori.experiments.il_report import Published, run_refinement
from difftori.experiments.il_study import Case, ILStudy, shortfalls
from difftori.experiments.study import Method
from difftori.paper.numbers import PaperNumber

FULL_UPDATES, FULL_EPISODES, DEMONSTRATIONS = 100_000, 50, 200
PUSH_T = "pusht"
PAPER_TASKS = ("square-ph", "transport-ph", "tool_hang-ph", PUSH_T)
"""The tasks of Tables 2, 4 and 7."""
FAILURE_RATES = "table2_and_4_robomimic_pusht_failure_rate"
"""The paper's results of Tables 2 and 4."""
MH_STEPS = {"lift": 500, "can": 500, "square": 500, "transport": 1100}
"""Limits of steps with robomimic's demonstrations of several operators. There are none of ToolHang."""
TASKS = (
    PUSH_T,
    *(task + suffix for task in ROBOMIMIC for suffix in ("", "-ph", *(("-mh",) if task in MH_STEPS else ()))),
)
DATA, PUBLIC_NAME = "pusht_cchi_v7_replay.zarr", "pusht-human"
LARGE: dict[str, dict[str, dict[str, object]]] = {
    "image": {"diffusion": {}, "bc-rnn-gmm": {}, "ibc": {}},
    "state": {"diffusion": {"preset": "lowdim"}, "bc-rnn-gmm": {"preset": "state"}, "ibc": {}},
}
"""For each observation type, the settings of the base policies at their sources' sizes."""
SMALL: dict[str, dict[str, object]] = {name: {"preset": "small"} for name in LARGE["image"]}

SMALL_BASE_SAMPLES = 4
"""Number of base samples of a diffusion policy at each training window. On a CPU, more samples take longer than the training."""


class ManipulationConfig(ILStudy):
    """Options of the studies on Robomimic and Push-T."""

    tasks: tuple[str, ...] = Field(default=PAPER_TASKS, min_length=1)
    """Tasks: `pusht`; `square`, `transport`, `tool_hang`, `lift`, `can` with demonstrations of a scripted expert; the same names with
    `-ph` or `-mh` with robomimic's human demonstrations (default: the paper's four)."""
    demos: Path = Path("demos")
    """Directory of the demonstrations. robomimic's are at `TASK/ph/*image*.hdf5` or `*low_dim*.hdf5` in it, those of Push-T at
    `pusht_cchi_v7_replay.zarr`. If they are missing when a base policy has to be trained, those of Push-T are downloaded (as by
    `difftori train --demos pusht-human`), and those of scripted experts are collected."""
    demonstrations: int = Field(default=DEMONSTRATIONS, ge=2)
    """Number of demonstrations of a scripted expert for each task and seed."""
    obs: Literal["image", "state"] = "image"
    """Observation type: images, as in the paper, or states (of Push-T, the poses of agent and block)."""
    sizes: Literal["paper", "small"] = "paper"
    """Sizes of the networks of the base policies; `small` is for CPUs."""
    updates: int = Field(default=FULL_UPDATES, ge=1)
    """Number of updates of every training, for base policies and refiners."""

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [task for task in tasks if task not in TASKS]:
            raise ValueError(f"{unknown[0]!r} is unknown. Fix: choose from {', '.join(TASKS)}")
        return tuple(dict.fromkeys(tasks))


def run_tables(
    config: ManipulationConfig,
    methods: Sequence[Method],
    compared: Sequence[tuple[str, str]],
    *,
    study: str,
    title: str,
    theirs: Sequence[Published],
    full_tasks: Sequence[str] = PAPER_TASKS,
    further: Mapping[str, bool],
    absolute: bool = False,
) -> None:
    """Run the missing runs, and write `out/<study>`.

    `theirs` are the paper's results, `full_tasks` its tasks. `further` are the study's own reasons that make it partial.
    `absolute`: control the robots by absolute poses (position control) instead of motions (velocity control).
    """
    if absolute and PUSH_T in config.tasks:
        raise ConfigError([f"tasks: {PUSH_T} has no position control. Fix: remove it"])
    scripted = any(task in ROBOMIMIC for task in config.tasks)
    checks = {
        "states instead of images": config.obs != "image",
        "small networks": config.sizes != "paper",
        **shortfalls(config, updates=FULL_UPDATES, episodes=FULL_EPISODES),
        f"{len(set(config.tasks) & set(full_tasks))} of {len(full_tasks)} tasks": not set(config.tasks)
        >= set(full_tasks),
        f"{config.demonstrations} scripted demonstrations": scripted,
        **further,
    }
    budget = f"{config.obs}-{config.sizes}-{config.updates}"
    number = f"-{config.demonstrations}-demos" if scripted and config.demonstrations != DEMONSTRATIONS else ""
    run_refinement(
        config,
        [_case(config, task, absolute) for task in config.tasks],
        methods,
        compared,
        study=study,
        title=title,
        reasons=[reason for reason, holds in checks.items() if holds],
        budget=f"{'+'.join(config.tasks)}-{budget}{number}",
        published=theirs,
        measure="score" if PUSH_T in config.tasks else "success",
        runs=f"manipulation/{budget}{number}{'-absolute' if absolute else ''}",
    )


def base(config: ManipulationConfig, name: str) -> Method:
    """Return a base policy at the study's sizes, labelled by its name."""
    return Method(name, name, (LARGE[config.obs] if config.sizes == "paper" else SMALL)[name])


def refiner(config: ManipulationConfig, label: str, policy: str, on: str, **settings: object) -> Method:
    """Return a refiner with its default settings except `settings`. At small sizes, it gets fewer samples of a diffusion policy."""
    if config.sizes == "small" and on == "diffusion":
        settings = {"base_samples": SMALL_BASE_SAMPLES, **settings}
    return Method(label, policy, settings, base=on)


def published(row: PaperNumber, label: str, *, data: str = "ph") -> Published:
    """Return a failure rate of the paper as the success rate (Push-T: score) of the method with this label.

    `data`: the demonstrations of the Robomimic tasks; the paper names them in Table 6 only, and `ph` is assumed elsewhere.
    """
    task = PUSH_T if row.task == "push-t" else f"{row.task.replace('-', '_')}-{data}"
    return Published(task, label, 1 - row.mean, row.std)


def _case(config: ManipulationConfig, task: str, absolute: bool) -> Case:
    """Return the environment and the demonstrations of a task."""
    if task == PUSH_T:
        demos = str(config.demos / DATA) if (config.demos / DATA).exists() else PUBLIC_NAME
        return Case(PUSH_T, "pose" if config.obs == "state" else "image", demos)
    name, _, data = task.partition("-")
    words = ["actions=absolute"] if absolute else []
    words += [f"max_steps={MH_STEPS[name]}"] if data == "mh" else []
    env, options = f"robomimic:{name}", {"env_options": tuple(words)} if words else {}
    if data:
        kind = "image" if config.obs == "image" else "low_dim"
        return Case(env, config.obs, _human(config.demos / name / data, kind), options=options, label=task)
    place = f"{{demos}}/{config.obs}-{config.demonstrations}/robomimic.{name}-{{seed}}.zarr"
    return Case(env, config.obs, place, config.demonstrations, options)


def _human(folder: Path, kind: str) -> str:
    """Return the path of robomimic's file, or one of `difftori data render`, by its name. If there are several, the first of motions."""
    found = sorted(folder.glob(f"*{kind}*.hdf5"), key=lambda path: ("abs" in path.name, path.name))
    return str(found[0] if found else folder / f"{kind}.hdf5")
