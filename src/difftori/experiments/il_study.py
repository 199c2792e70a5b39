"""Imitation studies: their options, and the demonstrations, base policies and refiners that they need."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from difftori.data.download import PUBLIC, find_demos
from difftori.errors import ConfigError
from difftori.experiments.plan import RunSpec, plan_run
from difftori.experiments.pool import Failure
from difftori.experiments.records import RecordFile
from difftori.experiments.study import Method, Result, Results, StudyOptions, StudyRun, run_study
from difftori.experiments.sweep import local, run_sweep

FULL_SEEDS = 3


class ILStudy(StudyOptions):
    """Options of all imitation studies."""

    seeds: int = Field(default=FULL_SEEDS, ge=1)
    """Number of seeds: 0 … seeds−1, each with its own demonstrations, held-out episodes and initial weights."""
    updates: int = Field(default=1500, ge=1)
    """Number of updates of every training, for base policies and refiners."""
    episodes: int = Field(default=50, ge=1)
    """Number of evaluation episodes of every policy, with the same seeds."""
    demos: Path = Path("demos")
    """Directory of the demonstrations. Missing ones are collected if the environment has an expert."""
    runs: Path = Path("runs/il")
    """Directory of the runs. Finished runs in it are not repeated, interrupted ones are resumed."""


def shortfalls(config: ILStudy, *, updates: int, episodes: int, seeds: int = FULL_SEEDS) -> dict[str, bool]:
    """Return the ways in which a study can be smaller than the full one, and whether it is, for `run_refinement`'s reasons."""
    return {
        f"{config.updates} of {updates} updates": config.updates < updates,
        f"{config.seeds} of {seeds} seeds": config.seeds < seeds,
        f"{config.episodes} of {episodes} episodes": config.episodes < episodes,
    }


@dataclass(frozen=True)
class Case:
    """An imitation task: an environment with an observation type. `demos` is the path of the data, with `{seed}` for the run's seed,
    or the name of a public data set.
    """

    env: str
    obs: str
    demos: str
    collect: int | None = None
    """Number of episodes to collect if the data are missing; None: the data must exist."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of `difftori train` for this task; refiners take them from their base."""
    label: str = ""
    """The name of the task in folders and tables, if it differs from the environment's."""

    @property
    def name(self) -> str:
        """The name of the task in folders and tables."""
        return self.label or self.env.partition(":")[2] or self.env


def run_imitation(
    config: ILStudy,
    cases: Sequence[Case],
    methods: Sequence[Method],
    *,
    study: str,
    reasons: Sequence[str],
    say: Callable[[str], None],
) -> Results[ILStudy]:
    """Collect missing demonstrations and run missing runs within the budget, and return the results of all finished runs."""
    engine = local(1, seconds=None if config.budget is None else 60 * config.budget)
    cases_by_run: dict[str, Case] = {}

    def prepare(wanted: Sequence[StudyRun]) -> tuple[list[Failure], list[StudyRun]]:
        """Collect the missing demonstrations of base policies."""
        demos = {run.key: demos_path(config, cases_by_run[run.key], run.seed) for run in wanted if run.base is None}
        missing = [_collection(cases_by_run[run.key], run, demos[run.key], say) for run in wanted if run.base is None]
        collections = {spec.folder: spec for spec in missing if spec is not None}
        failures = run_sweep(list(collections.values()), engine, say=say, done=lambda spec: None)
        return failures, [run for run in wanted if run.base is not None or _exists(demos[run.key])]

    runs = []
    for seed in range(config.seeds):
        for case in cases:
            planned = plan_runs(config, case, methods, seed, study)
            cases_by_run |= {run.key: case for run in planned}
            runs += planned
    results = run_study(
        config,
        runs,
        RecordFile(config.out / "runs" / "il" / f"{study}.jsonl"),
        usable=lambda record: record.summary is not None,
        reasons=reasons,
        say=say,
        prepare=prepare,
    )
    if retrained := retrained_bases(results.runs):
        state = f"{len(retrained)} refiners of a base that was retrained"
        results = replace(results, reasons=(*results.reasons, state))
    return results


def plan_runs(config: ILStudy, case: Case, methods: Sequence[Method], seed: int, study: str) -> list[StudyRun]:
    """Plan the runs of all methods on one task with one seed."""
    found: dict[str, StudyRun] = {}
    for method in methods:
        base = None if method.base is None else found[method.base]
        options: dict[str, Any] = {"seed": seed}
        if base is None:
            demos = demos_path(config, case, seed)
            options = {"env": case.env, "obs": case.obs, "demos": demos, **case.options, **options}
        else:
            options = {"base": base.spec.folder, **options}
        options |= {"updates": method.updates * config.updates, **method.settings, **method.options}
        options |= {"eval_episodes": config.episodes, "device": config.device}
        label = re.sub(r"[^\w.]+", "-", method.label, flags=re.ASCII)
        key = f"{case.name.replace(':', '.')}/{label}/seed-{seed}"
        name, folder = f"{case.name}, {method.label}, seed {seed}", config.runs / study / key
        below = (None, None) if base is None else (base.spec, base.config)
        spec, parsed = plan_run(name, method.trains, options, folder, below)
        found[method.label] = StudyRun(case.name, method, seed, key, spec, parsed, base)
    return list(found.values())


def demos_path(config: ILStudy, case: Case, seed: int) -> str:
    """Return the path or name of a task's data for a seed."""
    return case.demos.format(demos=config.demos, seed=seed)


def retrained_bases(results: Sequence[Result]) -> list[Result]:
    """Return the refiners whose base has other weights than the base in the results, for example retrained on another machine."""
    weights = {result.run.key: result.record.weights for result in results}
    found = []
    for result in results:
        base = None if result.run.base is None else weights.get(result.run.base.key)
        if None not in (base, result.record.base_weights) and base != result.record.base_weights:
            found.append(result)
    return found


def _exists(demos: str) -> bool:
    return demos in PUBLIC or Path(demos).exists()


def _collection(case: Case, run: StudyRun, demos: str, say: Callable[[str], None]) -> RunSpec | None:
    """Return the command that collects the demonstrations of a run; None if they exist. Public data sets are downloaded immediately.

    Raises ConfigError for data that must exist.
    """
    path = Path(demos)
    if path.exists():
        return None
    if demos in PUBLIC:
        find_demos(demos, say)
        return None
    if case.collect is None:
        raise ConfigError([f"demos: {path} does not exist. Fix: provide the demonstrations of {case.name}"])
    words = ("collect", "--env", case.env, "--episodes", str(case.collect), "--seed", str(run.seed), "--obs", case.obs)
    name = f"{case.name}, demonstrations, seed {run.seed}"
    return RunSpec(name, (*words, "--out", str(path.parent), "--quiet"), path)
