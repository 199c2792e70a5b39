"""Runs of imitation in an environment: demonstrations, bases, what refines them, and what each of them came to."""

import json
import math
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from difftori.config import overlay, read_tokens
from difftori.data.download import PUBLIC, find_demos
from difftori.errors import ConfigError, DataError
from difftori.experiments.pool import Failure, Work, option_words, run_all, training
from difftori.il.config import TrainConfig, inherited, parse_config
from difftori.registry import find_policy
from difftori.runs.checkpoint import replace_file
from difftori.runs.records import read_config, read_summary

FULL_SEEDS = 3


class ImitationConfig(BaseModel):
    """Options that all studies of imitation share; each has a `Config` of its own with its tasks and arms."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seeds: int = Field(FULL_SEEDS, ge=1)
    """Seeds 0 … seeds−1, each with demonstrations, held out episodes and weights of its own."""
    updates: int = Field(1500, ge=1)
    """Updates of every training, base and refiner alike."""
    episodes: int = Field(50, ge=1)
    """Evaluation episodes of every policy, from the same seeds."""
    jobs: int = Field(1, ge=1)
    """Runs at once, a process with one thread each."""
    budget: float | None = Field(None, ge=0)
    """Minutes after which no further run is started; those that run are finished. 0 only draws what exists."""
    device: str = "cpu"
    """Where runs compute."""
    demos: Path = Path("demos")
    """Folder of demonstrations; what is missing is collected, where the environment has an expert."""
    runs: Path = Path("runs/il")
    """Where runs go; finished ones found there are not repeated, interrupted ones go on."""
    out: Path = Path("results")
    """Where tables and pictures go, in `partial` if the study is less than full. In `runs`, a small file of each finished
    run is kept, so that a study goes on, or is drawn, on another machine."""


@dataclass(frozen=True)
class Case:
    """What is imitated: an environment, and how it is seen. `demos` names the data, `{seed}` in it the run's seed, or
    is the name of a public set.
    """

    env: str
    obs: str
    demos: str
    collect: int | None = None
    """Episodes to collect where the data are missing; None: they must be there."""

    @property
    def name(self) -> str:
        """For folders and tables."""
        return self.env.partition(":")[2] or self.env


@dataclass(frozen=True)
class Arm:
    """What is compared: a policy with settings of its own, on the base of that label if it refines one. `updates` counts
    in those of the study.
    """

    label: str
    policy: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    updates: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of `difftori train`."""


@dataclass(frozen=True)
class Job:
    """One run: the words after `difftori`, its folder, the job whose policy it refines, and the file that keeps its result."""

    case: Case
    arm: Arm
    seed: int
    folder: Path
    words: tuple[str, ...]
    kept: Path
    base: "Job | None"

    @property
    def name(self) -> str:
        """Task, arm and seed."""
        return f"{self.case.name}, {self.arm.label}, seed {self.seed}"

    @property
    def ended_here(self) -> bool:
        """Whether the run's folder is here and finished."""
        return (self.folder / "summary.json").exists()

    @property
    def finished(self) -> bool:
        """Whether the run has ended, here or where its kept file comes from."""
        return self.ended_here or self.kept.exists()


@dataclass(frozen=True)
class Result:
    """A finished run: outcomes of its evaluation episodes by name (N), from `seeds` (N), and its summary."""

    job: Job
    seeds: tuple[int, ...]
    success: np.ndarray
    score: np.ndarray
    summary: Mapping[str, float]
    weights: str | None = None
    """Digest of what was learned, and of the base that was refined."""
    base_weights: str | None = None


@dataclass(frozen=True)
class Results:
    """A study's finished runs, of those that it wants; `reasons` says why it is less than the full study."""

    cases: tuple[Case, ...]
    arms: tuple[Arm, ...]
    runs: tuple[Result, ...]
    reasons: tuple[str, ...]
    failures: tuple[Failure, ...]

    def of(self, case: Case, label: str) -> dict[int, Result]:
        """The finished runs of an arm on a task, by seed."""
        return {r.job.seed: r for r in self.runs if r.job.case.name == case.name and r.job.arm.label == label}

    @property
    def label(self) -> str:
        """`full`, or `partial (…)` with all reasons."""
        return f"partial ({', '.join(self.reasons)})" if self.reasons else "full"


def make_results(
    config: ImitationConfig,
    cases: Sequence[Case],
    arms: Sequence[Arm],
    *,
    study: str,
    reasons: Sequence[str],
    say: Callable[[str], None],
) -> Results:
    """Collect and run what is missing, as far as the budget goes, and read what exists.

    Bases come before what refines them. ConfigError for runs of other settings in the folders, or if nothing exists.
    """
    jobs = [job for seed in range(config.seeds) for case in cases for job in _jobs(config, case, arms, seed, study)]
    faults = [fault for job in jobs for fault in strange_settings(job)]
    if faults:
        raise ConfigError([*faults[:8], f"runs: {config.runs} holds runs of other settings; choose another"])
    for job in jobs:
        keep(job)
    say(f"{sum(job.finished for job in jobs)} of {len(jobs)} runs are finished")
    failures = _run(config, jobs, say)
    runs = tuple(read_result(job) for job in jobs if job.finished)
    if not runs:
        said = [f"{failure.work.name}: {failure.reason} (all of it: {failure.work.log})" for failure in failures]
        raise ConfigError([*said, f"runs: nothing to draw in {config.runs}; give a larger --budget"])
    state = [] if len(runs) == len(jobs) else [f"{len(runs)} of {len(jobs)} runs finished"]
    if strange := strange_bases(runs):
        state.append(f"{len(strange)} refiners of a base that was trained anew")
    return Results(tuple(cases), tuple(arms), runs, (*reasons, *state), tuple(failures))


def _jobs(config: ImitationConfig, case: Case, arms: Sequence[Arm], seed: int, study: str) -> list[Job]:
    """The runs of all arms on one task from one seed."""
    found: dict[str, Job] = {}
    for arm in arms:
        base = None if arm.base is None else found[arm.base]
        place = Path(
            study, case.name.replace(":", "."), re.sub(r"[^\w.]+", "-", arm.label, flags=re.ASCII), f"seed-{seed}"
        )
        folder = config.runs / place
        options: dict[str, Any] = {}
        if base is None:
            options = {"env": case.env, "obs": case.obs, "demos": demos_path(config, case, seed), "seed": seed}
        else:
            options = {"base": base.folder, "seed": seed}
        options |= {"updates": arm.updates * config.updates, **arm.settings, **arm.options}
        options |= {"eval_episodes": config.episodes, "device": config.device, "out": folder}
        words = [word for name, value in options.items() for word in option_words(name, value)]
        kept = config.out / "runs" / "il" / place.with_suffix(".json")
        found[arm.label] = Job(case, arm, seed, folder, ("train", arm.policy, *words, "--quiet"), kept, base)
    return list(found.values())


def demos_path(config: ImitationConfig, case: Case, seed: int) -> str:
    """The data of a task for a seed."""
    return case.demos.format(demos=config.demos, seed=seed)


def _run(config: ImitationConfig, jobs: Sequence[Job], say: Callable[[str], None]) -> list[Failure]:
    """Run what is missing in waves: demonstrations, then bases, then what refines them."""
    wanted = {job.folder: job for job in jobs if not job.finished}
    for job in list(wanted.values()):  # a base is needed here if what refines it is
        below = job.base
        while below is not None and not below.ended_here:
            wanted[below.folder] = below
            below = below.base
    until = None if config.budget is None else time.monotonic() + 60 * config.budget

    def left() -> float | None:
        return None if until is None else max(0.0, until - time.monotonic())

    failures, _ = run_all(_collections(config, wanted.values(), say), jobs=1, seconds=left(), say=say)
    for depth in range(1 + max((_depth(job) for job in wanted.values()), default=-1)):
        wave = [job for job in wanted.values() if _depth(job) == depth and not job.ended_here]
        ready = [job for job in wave if (_has_demos(config, job) if job.base is None else job.base.ended_here)]
        works = {training(job.name, job.words, job.folder): job for job in ready}
        failed, _ = run_all(
            list(works), jobs=config.jobs, seconds=left(), say=say, done=lambda work, w=works: keep(w[work])
        )
        failures += failed
    return failures


def _has_demos(config: ImitationConfig, job: Job) -> bool:
    demos = demos_path(config, job.case, job.seed)
    return demos in PUBLIC or Path(demos).exists()


def _depth(job: Job) -> int:
    return 0 if job.base is None else 1 + _depth(job.base)


def _collections(config: ImitationConfig, jobs: Any, say: Callable[[str], None]) -> list[Work]:
    """The commands that collect what demonstrations are missing; public ones are downloaded at once, if they are not here.

    ConfigError for data that must be there.
    """
    works: dict[str, Work] = {}
    for job in jobs:
        demos = demos_path(config, job.case, job.seed)
        path = Path(demos)
        if job.base is not None or path.exists():
            continue
        if demos in PUBLIC:
            find_demos(demos, say)
            continue
        if job.case.collect is None:
            raise ConfigError([f"demos: {path} is not there; give the demonstrations of {job.case.name}"])
        obs = ("--obs", job.case.obs)
        words = ("collect", "--env", job.case.env, "--episodes", str(job.case.collect), "--seed", str(job.seed), *obs)
        log = path.with_suffix(".log")
        works[str(path)] = Work(
            f"{job.case.name}, demonstrations, seed {job.seed}", (*words, "--out", str(path.parent), "--quiet"), log
        )
    return list(works.values())


def keep(job: Job) -> None:
    """Write the finished run's kept file, unless it is there."""
    if not job.ended_here or job.kept.exists():
        return
    versions = json.loads((job.folder / "versions.json").read_bytes())
    plain = {
        "config": read_config(job.folder),
        "hardware": f"{versions.get('device_name') or versions['cpu']}, {versions['threads']} thread(s)",
        "versions": {name: versions.get(name) for name in ("git_commit", "difftori", "torch", "numpy", "python")},
        "command": shlex.join(["difftori", *job.words]),
        "weights": _digest(job.folder / "policy.pt"),
        "base_weights": _digest(job.folder / "base.pt"),
        "summary": {k: v if math.isfinite(v) else None for k, v in read_summary(job.folder).items()},
        "episodes": json.loads((job.folder / "episodes.json").read_bytes()),
    }
    job.kept.parent.mkdir(parents=True, exist_ok=True)
    replace_file(job.kept, (json.dumps(plain, indent=0) + "\n").encode())


def _digest(weights: Path) -> str | None:
    """What stands beside exported weights."""
    beside = weights.with_name(f"{weights.name}.sha256")
    return beside.read_text().split()[0] if beside.exists() else None


def strange_bases(runs: Sequence[Result]) -> list[Result]:
    """The refiners whose base was trained anew, elsewhere perhaps, and is not the one that is compared with."""
    held = {run.job.folder: run.weights for run in runs}
    bases = [None if run.job.base is None else held.get(run.job.base.folder) for run in runs]
    return [
        run
        for run, base in zip(runs, bases, strict=True)
        if None not in (base, run.base_weights) and base != run.base_weights
    ]


def read_result(job: Job) -> Result:
    """What a finished run came to. DataError if its file is damaged."""
    keep(job)
    plain = read_kept(job.kept)
    columns = {name: np.array(plain["episodes"]["last"][name]) for name in ("seed", "success", "score")}
    seeds = tuple(int(seed) for seed in columns["seed"])
    digests = plain.get("weights"), plain.get("base_weights")
    return Result(job, seeds, columns["success"], columns["score"], plain["summary"], *digests)


_FREE = {"device", "threads", "save_every", "num_envs", "workers", "base", "demos"}
"""Keys of a run's configuration that do not decide what is compared, or that are paths: data are compared by name."""


def strange_settings(job: Job) -> list[str]:
    """How the run in the job's folder or kept file differs from the job, one line per key; empty if it does not."""
    found: dict[Path, dict[str, Any]] = {}
    if (job.folder / "config.yaml").exists():
        found[job.folder] = read_config(job.folder)
    if job.kept.exists():
        found[job.kept] = read_kept(job.kept)["config"]
    wanted, faults = _flat(wanted_values(job)), []
    for place, values in found.items():
        there = _flat({**values, "base": None})
        faults += [f"{k}: {v!r} wanted, {there.get(k)!r} in {place}" for k, v in wanted.items() if v != there.get(k)]
    return faults


def wanted_values(job: Job) -> dict[str, Any]:
    """The job's configuration as plain values; what a refiner takes from its base comes from the base's job."""
    options = read_tokens([word for word in job.words[2:] if word != "--quiet"])
    values = overlay({"policy": job.arm.policy}, options, TrainConfig[find_policy(job.arm.policy).Config])
    del values["out"]
    if job.base is not None:
        below = parse_config(wanted_values(job.base)).model_dump()  # with the base policy's own window
        values |= {name: value for name, value in inherited(below).items() if values.get(name) is None}
    return {**values, "base": None}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Every key of the whole configuration, and the name of the data."""
    plain = parse_config(values).model_dump(mode="json")
    settings = plain.pop("settings")
    kept = {name: value for name, value in plain.items() if name not in _FREE}
    data = PUBLIC[plain["demos"]].folder if plain["demos"] in PUBLIC else plain["demos"]
    return kept | {f"settings.{name}": value for name, value in settings.items()} | {"data": Path(data).name}


def read_kept(path: Path) -> dict[str, Any]:
    """A kept file as plain values. DataError if it is damaged."""
    try:
        plain = json.loads(path.read_bytes())
        columns = plain["episodes"]["last"]
        if len({len(columns[name]) for name in ("seed", "success", "score")}) != 1 or "config" not in plain:
            raise ValueError("its columns differ in length")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no readable run ({error}); restore it, or remove it to run again") from error
    return plain
