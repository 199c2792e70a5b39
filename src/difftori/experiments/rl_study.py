"""Reinforcement learning studies: their options, and the runs that they need."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from difftori.experiments.plan import plan_run
from difftori.experiments.records import RecordFile
from difftori.experiments.study import Method, Result, Results, StudyOptions, StudyRun, run_study
from difftori.registry import find_agent

Task = Literal[
    "cartpole-swingup-sparse",
    "cheetah-run",
    "cup-catch",
    "finger-spin",
    "finger-turn-easy",
    "finger-turn-hard",
    "hopper-stand",
    "pendulum-swingup",
    "quadruped-run",
    "quadruped-walk",
    "reacher-easy",
    "reacher-hard",
    "walker-run",
    "walker-stand",
    "walker-walk",
]
TASKS: tuple[Task, ...] = get_args(Task)
FULL_SEEDS, FULL_STEPS = 5, 1_000_000
QUICK_ENVS = ("probe:two-step", "probe:delayed-reward")
QUICK_STEPS, QUICK_SEEDS = 72, 2
_QUICK: dict[str, Any] = {
    "latent_dim": 8,
    "width": 16,
    "encoder_width": 16,
    "batch_size": 16,
    "horizon": 2,
    "seed_steps": 20,
    "updates_per_step": 0.25,
    "samples": 8,
    "elites": 4,
    "prior_samples": 2,
    "iterations": 1,
}
"""Settings of the quick study; an agent gets those that it has."""


class RLStudy(StudyOptions):
    """Options of all reinforcement learning studies."""

    tasks: tuple[Task, ...] = Field(default=TASKS, min_length=1)
    """Tasks of DeepMind Control (default: the paper's 15)."""
    seeds: int = Field(default=FULL_SEEDS, ge=1)
    """Number of seeds: 0 … seeds−1."""
    steps: int = Field(default=FULL_STEPS, ge=1)
    """Number of environment steps of every run."""
    obs: Literal["state", "pixels"] = "pixels"
    """Observation type; the paper uses pixels."""
    action_repeat: int | None = Field(default=None, ge=1)
    """Number of environment steps per agent step (default: the paper's for each task). Published TD-MPC from states uses 4 on most
    tasks."""
    preset: Literal["paper", "compact", "small", "narrow"] = "paper"
    """Sizes of networks and planner. `compact` and `small` are for CPUs, and not comparable with the paper. `narrow` is `small` with
    4 latent dimensions, too few for the model that Eq. 3 learns."""
    compile: bool = False
    """Compile inference and updates with torch.compile. The first run takes minutes to compile; afterwards, runs are faster."""
    eval_every: int = Field(default=20_000, ge=1)
    """Number of environment steps between evaluations, each of 10 episodes."""
    runs: Path = Path("runs/rl")
    """Directory of the runs, shared by all studies. Finished runs in it are not repeated, interrupted ones are resumed."""
    quick: bool = False
    """Run two probe environments with tiny networks, to check that everything works."""


Curves = Results[RLStudy]


def num_seeds(config: RLStudy) -> int:
    """Return the number of seeds per task and method."""
    return min(config.seeds, QUICK_SEEDS) if config.quick else config.seeds


def num_steps(config: RLStudy) -> int:
    """Return the number of environment steps of every run."""
    return QUICK_STEPS if config.quick else config.steps


def observation(config: RLStudy) -> str:
    """Return the observation type: `state`, `pixels`, or `probe` for the probe environments, without published results."""
    return "probe" if config.quick else config.obs


def full_return(config: RLStudy) -> float:
    """Return the return that is normalised to 1: 1000 in DeepMind Control, 1 in the probe environments."""
    return 1.0 if config.quick else 1000.0


def budget_name(config: RLStudy) -> str:
    """Return the folder name of a budget, such as `state-compact-100000`."""
    if config.quick:
        return "quick"
    repeat = "" if config.action_repeat is None else f"-repeat{config.action_repeat}"
    return f"{config.obs}-{config.preset}-{config.steps}{repeat}"


def partial_reasons(config: RLStudy) -> list[str]:
    """Return the reasons why the configuration is less than the full study, which its defaults are; empty if it is not less."""
    full: dict[str, Any] = {name: field.default for name, field in type(config).model_fields.items()}
    tasks, names = set(full["tasks"]), {"state": "states", "pixels": "pixels"}
    checks = {
        "quick": config.quick,
        f"{names[config.obs]} instead of {names[full['obs']]}": config.obs != full["obs"],
        f"preset {config.preset}": config.preset != full["preset"],
        f"action repeat {config.action_repeat}": config.action_repeat != full["action_repeat"],
        f"{num_steps(config)} of {full['steps']} steps": num_steps(config) < full["steps"],
        f"{num_seeds(config)} of {full['seeds']} seeds": num_seeds(config) < full["seeds"],
        f"{len(tasks & set(config.tasks))} of {len(tasks)} tasks": not tasks <= set(config.tasks),
    }
    return [reason for reason, holds in checks.items() if holds]


def plan_runs(config: RLStudy, methods: Sequence[Method]) -> list[StudyRun]:
    """Plan all runs: every task with every method from the first seed, then from the second, and so on.

    A limited budget therefore omits the last seeds, and methods stay in pairs.
    """
    tasks = QUICK_ENVS if config.quick else config.tasks
    return [
        _plan(config, task, method, seed) for seed in range(num_seeds(config)) for task in tasks for method in methods
    ]


def make_curves(
    config: RLStudy, methods: Sequence[Method], *, further: Sequence[str] = (), say: Callable[[str], None]
) -> Curves:
    """Run the missing runs, and read all records, finished or not; see `run_study`.

    `further` are the study's own reasons that make it partial.
    """
    file = None if config.quick else RecordFile(config.out / "runs" / f"{budget_name(config)}.jsonl")
    return run_study(
        config,
        plan_runs(config, methods),
        file,
        usable=lambda record: bool(record.returns),
        reasons=(*partial_reasons(config), *further),
        say=say,
    )


def common_steps(results: Sequence[Result]) -> np.ndarray:
    """Return the environment steps at which all runs have an evaluation, ascending."""
    if not results:
        return np.zeros(0, dtype=int)
    common = results[0].steps
    for result in results[1:]:
        common = np.intersect1d(common, result.steps)
    return common


def at_steps(results: Sequence[Result], steps: np.ndarray) -> np.ndarray:
    """Return the returns (runs k) at `steps` (k). Every run must have an evaluation at each of them."""
    return np.array([result.returns[np.searchsorted(result.steps, steps)] for result in results])


def _plan(config: RLStudy, task: str, method: Method, seed: int) -> StudyRun:
    known = find_agent(method.trains).Config.model_fields
    quick = {name: value for name, value in _QUICK.items() if name in known}
    settings: dict[str, Any] = {**(quick if config.quick else {"preset": config.preset}), **method.settings}
    settings |= {} if config.quick else method.task_settings.get(task, {})
    options: dict[str, Any] = {
        "env": task if config.quick else f"dmc:{task}",
        "obs": "state" if config.quick else config.obs,
        "steps": num_steps(config),
        "seed": seed,
        "eval_every": QUICK_STEPS // 3 if config.quick else config.eval_every,
        "device": config.device,
        **method.options,
    }
    if config.action_repeat is not None and not config.quick:
        options["action_repeat"] = config.action_repeat
    if config.compile:
        options["compile"] = True
    key = f"{task.replace(':', '.')}/{_folder_name(method, settings)}/seed-{seed}"
    name = f"{task}, {method.label}, seed {seed}"
    folder = config.runs / budget_name(config) / key
    spec, parsed = plan_run(name, method.trains, {**options, **settings}, folder)
    return StudyRun(task, method, seed, key, spec, parsed)


def _folder_name(method: Method, settings: dict[str, Any]) -> str:
    """Return the folder name of a method. It includes `pg`, so that it stays valid if the default changes."""
    resolved = find_agent(method.trains).Config.model_validate(settings).model_dump()
    named = {"pg": resolved["pg"], **method.settings} if "pg" in resolved else dict(method.settings)
    named |= method.options
    words = {name: "+".join(value) if isinstance(value, tuple) else value for name, value in named.items()}
    return "_".join([method.trains, *(f"{name}-{value}" for name, value in words.items())])
