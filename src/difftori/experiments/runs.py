"""Which runs of reinforcement learning a study needs: options, arms, run folders, and the command of each run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from difftori.errors import DataError
from difftori.experiments.pool import option_words
from difftori.rl.config import RLConfig, parse_rl_config
from difftori.runs.records import read_config, without_retired

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
}
_QUICK_MPPI: dict[str, Any] = {"samples": 8, "elites": 4, "prior_samples": 2, "iterations": 1}
_FREE = {"device", "threads", "compile", "workers", "storage", "save_every", "keep_episodes"}
"""Keys of a run's configuration that do not decide what is compared: where and how it computed."""


class StudyConfig(BaseModel):
    """Options that all studies of reinforcement learning share; each has a `Config` of its own with its arms and folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tasks: tuple[Task, ...] = Field(TASKS, min_length=1)
    """Of the paper's 15."""
    seeds: int = Field(FULL_SEEDS, ge=1)
    """Seeds 0 … seeds−1."""
    steps: int = Field(FULL_STEPS, ge=1)
    """Environment steps of every run."""
    obs: Literal["state", "pixels"] = "pixels"
    """What is seen; the paper's are pixels."""
    action_repeat: int | None = Field(None, ge=1)
    """Environment steps per decision; the paper's unless given. The published TD-MPC from states has 4 on most tasks."""
    preset: Literal["paper", "compact", "small", "narrow"] = "paper"
    """Sizes of networks and planner; `compact` and `small` are for CPUs, and not comparable with the paper; `narrow` is small
    with 4 latent dimensions, too few for the model that Eq. 3 wants."""
    budget: float | None = Field(None, ge=0)
    """Minutes after which no further run is started; those that run are finished. 0 only draws what exists."""
    jobs: int = Field(1, ge=1)
    """Runs at once, a process with one thread each. More than one makes wall-clock times depend on each other."""
    device: str = "cpu"
    """Where runs compute; `cuda` for pixels."""
    compile: bool = False
    """Compile acting and updating; minutes at the first run, then faster."""
    eval_every: int = Field(20_000, ge=1)
    """Environment steps between evaluations of 10 episodes."""
    runs: Path = Path("runs/rl")
    """Where runs go, shared by all studies; finished ones found there are not repeated, interrupted ones go on."""
    out: Path = Path("results")
    """Where tables and pictures go; those of a partial study into its folder `partial`, never in place of full ones. In
    `runs`, a small file of each finished run is kept, so that a study goes on, or is drawn, on another machine."""
    quick: bool = False
    """Two probe environments with tiny networks, to see that everything runs."""


@dataclass(frozen=True)
class Arm:
    """What is compared: an agent with settings of its own beside its preset's. `label` names it in tables and pictures."""

    label: str
    agent: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run: an arm on a task from a seed, its whole configuration, its folder, the words after `difftori`, and the small
    file in which results keep it (_records.py).
    """

    task: str
    arm: Arm
    seed: int
    config: RLConfig
    folder: Path
    words: tuple[str, ...]
    kept: Path

    @property
    def name(self) -> str:
        """Task, arm and seed."""
        return f"{self.task}, {self.arm.label}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the run has ended, here or where its kept file comes from."""
        return self.ended_here or self.kept.exists()

    @property
    def ended_here(self) -> bool:
        """Whether a run in the folder has ended."""
        return (self.folder / "summary.json").exists()


def plan_jobs(config: StudyConfig, arms: Sequence[Arm]) -> list[Job]:
    """All runs of the study: every task with every arm from the first seed, then from the second, and so on.

    So what a budget cuts off are whole seeds, and arms stay in pairs.
    """
    tasks = QUICK_ENVS if config.quick else config.tasks
    return [_job(config, task, arm, seed) for seed in range(num_seeds(config)) for task in tasks for arm in arms]


def num_seeds(config: StudyConfig) -> int:
    """Seeds per task and arm."""
    return min(config.seeds, QUICK_SEEDS) if config.quick else config.seeds


def num_steps(config: StudyConfig) -> int:
    """Environment steps of every run."""
    return QUICK_STEPS if config.quick else config.steps


def observation(config: StudyConfig) -> str:
    """`state`, `pixels`, or `probe` where nothing published compares."""
    return "probe" if config.quick else config.obs


def full_return(config: StudyConfig) -> float:
    """The return that counts as 1 in normalised scores: 1000 in DeepMind Control, 1 in the probes."""
    return 1.0 if config.quick else 1000.0


def budget_name(config: StudyConfig) -> str:
    """The folder name of one budget: `state-compact-100000`."""
    if config.quick:
        return "quick"
    repeat = "" if config.action_repeat is None else f"-repeat{config.action_repeat}"
    return f"{config.obs}-{config.preset}-{config.steps}{repeat}"


def partial_reasons(config: StudyConfig) -> list[str]:
    """Why the configuration is less than the full study; empty if it is not."""
    checks = {
        "quick": config.quick,
        "states instead of pixels": config.obs != "pixels",
        f"preset {config.preset}": config.preset != "paper",
        f"action repeat {config.action_repeat}": config.action_repeat is not None,
        f"{num_steps(config)} of {FULL_STEPS} steps": num_steps(config) < FULL_STEPS,
        f"{num_seeds(config)} of {FULL_SEEDS} seeds": num_seeds(config) < FULL_SEEDS,
        f"{len(set(config.tasks))} of {len(TASKS)} tasks": set(config.tasks) != set(TASKS),
    }
    return [reason for reason, holds in checks.items() if holds]


def strange_settings(job: Job) -> list[str]:
    """How the run in the job's folder or kept file differs from the job, one line per key; empty if it does not, or none is
    there.

    Where and how a run computed does not count, so that runs of other machines can be drawn here.
    """
    found: dict[Path, dict[str, Any]] = {}
    if (job.folder / "config.yaml").exists():
        found[job.folder] = read_config(job.folder)
    if job.kept.exists():
        found[job.kept] = without_retired(read_kept(job.kept)["config"])
    wanted, faults = _flat(job.config), []
    for place, values in found.items():
        try:
            there = _flat(type(job.config).model_validate(values))
        except ValidationError as error:
            faults += [f"{place}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            continue
        faults += [
            f"{key}: {value!r} wanted, {there.get(key)!r} in {place}"
            for key, value in wanted.items()
            if value != there.get(key)
        ]
    return faults


def read_kept(path: Path) -> dict[str, Any]:
    """A kept file as plain values. DataError if it is damaged."""
    try:
        plain = json.loads(path.read_bytes())
        lacking = {"config", "hardware", "versions", "command", "summary", "evaluations"} - set(plain)
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: no readable run ({error}); restore it, or remove it to run again") from error
    return plain


def _job(config: StudyConfig, task: str, arm: Arm, seed: int) -> Job:
    quick = {**_QUICK, **(_QUICK_MPPI if arm.agent == "tdmpc" else {})}
    settings: dict[str, Any] = {**(quick if config.quick else {"preset": config.preset}), **arm.settings}
    values: dict[str, Any] = {
        "env": task if config.quick else f"dmc:{task}",
        "obs": "state" if config.quick else config.obs,
        "steps": num_steps(config),
        "seed": seed,
        "eval_every": QUICK_STEPS // 3 if config.quick else config.eval_every,
        "device": config.device,
    }
    if config.action_repeat is not None and not config.quick:
        values["action_repeat"] = config.action_repeat
    if config.compile:
        values["compile"] = True
    parsed = parse_rl_config({"agent": arm.agent, **values, "settings": settings})
    place = Path(budget_name(config), task.replace(":", "."), _slug(arm, parsed), f"seed-{seed}")
    folder = config.runs / place
    options = [word for name, value in {**values, **settings}.items() for word in option_words(name, value)]
    words = ("train", arm.agent, *options, "--out", str(folder), "--quiet")
    return Job(task, arm, seed, parsed, folder, words, config.out / "runs" / place.with_suffix(".json"))


def _slug(arm: Arm, parsed: RLConfig) -> str:
    """A folder name for the arm that stays right when the default of `pg` changes."""
    settings = dict(arm.settings)
    resolved = parsed.settings.model_dump()
    if "pg" in resolved:
        settings = {"pg": resolved["pg"], **settings}
    words = {name: "+".join(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return "_".join([arm.agent, *(f"{name}-{value}" for name, value in words.items())])


def _flat(config: RLConfig) -> dict[str, Any]:
    plain = config.model_dump(mode="json")
    settings = plain.pop("settings")
    kept = {name: value for name, value in plain.items() if name not in _FREE}
    return kept | {f"settings.{name}": value for name, value in settings.items()}
