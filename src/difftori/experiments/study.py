"""Base of all studies: the methods that are compared, the runs that they need, and the results."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from difftori.data.download import PUBLIC
from difftori.errors import ConfigError, DataError
from difftori.experiments.plan import RunSpec
from difftori.experiments.pool import Failure
from difftori.experiments.records import RETURN, Record, RecordFile, due_steps, read_run
from difftori.experiments.sweep import local, run_sweep
from difftori.runs.records import flat
from difftori.trainers import trainer_of

_SHOWN = 8
_NOT_COMPARED = {
    "policy": {"device", "threads", "save_every", "num_envs", "workers", "base", "demos"},
    "agent": {"device", "threads", "save_every", "compile", "workers", "storage", "keep_episodes"},
}
"""Keys of a run's configuration that are not compared: machine, execution and paths."""


class StudyOptions(BaseModel):
    """Options of all studies."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    jobs: int = Field(default=1, ge=1)
    """Number of concurrent runs, each a process with one thread. With more than one, wall-clock times depend on each other."""
    budget: float | None = Field(default=None, ge=0)
    """Minutes after which no further run is started; running ones are finished (default: no limit). 0 starts no run, and writes tables
    and figures of the existing ones."""
    device: str = "cpu"
    """Device of the runs, such as `cpu` or `cuda`."""
    runs: Path
    """Directory of the runs. Finished runs in it are not repeated, interrupted ones are resumed."""
    out: Path = Path("results")
    """Directory of tables and figures; those of a partial study are in its folder `partial`. Its folder `runs` stores a record of each
    finished run, so that a study can be resumed, and its tables and figures written, on another machine."""


OptionsT = TypeVar("OptionsT", bound=StudyOptions)


@dataclass(frozen=True)
class Method:
    """A method to compare: a policy or an agent with its settings. `label` is its name in tables and figures."""

    label: str
    trains: str
    """Name of the policy or the agent."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    """Label of the method whose policy it refines."""
    updates: int = 1
    """Length of the training, as a multiple of the study's number of updates."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of `difftori train`."""
    task_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further settings for some tasks, by the name of the task."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: a method on a task with a seed. `key` is its name in the study's record file."""

    task: str
    method: Method
    seed: int
    key: str
    spec: RunSpec
    config: Any
    base: "StudyRun | None" = None


@dataclass(frozen=True)
class Result:
    """A run with its record."""

    run: StudyRun
    record: Record

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.seed

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.record.summary is not None

    @property
    def summary(self) -> Mapping[str, float]:
        """The summary of the finished run."""
        assert self.record.summary is not None
        return self.record.summary

    @cached_property
    def steps(self) -> np.ndarray:
        """Environment steps (k) at which the evaluations were due."""
        steps = np.array([row["step"] for row in self.record.returns])
        return due_steps(steps, self.run.config.eval_every, self.run.config.steps)

    @cached_property
    def returns(self) -> np.ndarray:
        """Mean returns (k) of the evaluations. Raises DataError if one is NaN."""
        broken = [row["step"] for row in self.record.returns if row[RETURN] is None]
        if broken:
            where = self.run.spec.folder
            raise DataError(f"{where}: the return at step {broken[0]} is NaN. Fix: remove the folder and run again")
        return np.array([row[RETURN] for row in self.record.returns], dtype=np.float64)

    @cached_property
    def seconds(self) -> np.ndarray:
        """Training seconds (k) until each evaluation, without the time of evaluations."""
        return np.array([row["seconds/total"] - row["seconds/evaluation"] for row in self.record.returns])

    @cached_property
    def updates(self) -> np.ndarray:
        """Number of updates (k) until each evaluation."""
        return np.array([row["updates"] for row in self.record.returns])

    @property
    def area(self) -> float:
        """The mean of all evaluations: the area under the learning curve divided by its width."""
        return float(self.returns.mean())

    def at(self, steps: int) -> float | None:
        """Return the return at this number of environment steps; None if there is no evaluation at it."""
        found = self.returns[self.steps == steps]
        return float(found[0]) if len(found) else None

    def episodes(self, measure: str) -> np.ndarray:
        """Return a column (N) of the evaluation episodes of the last weights: `seed`, `success` or `score`."""
        return np.array(self.record.episodes["last"][measure])


@dataclass(frozen=True)
class Results(Generic[OptionsT]):
    """The runs of a study that have results. `reasons` are the reasons why it is less than the full study."""

    options: OptionsT
    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    runs: tuple[Result, ...]
    reasons: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()

    def of(self, task: str, label: str) -> dict[int, Result]:
        """Return the results of a method on a task, by seed."""
        return {r.seed: r for r in self.runs if r.run.task == task and r.run.method.label == label}

    @property
    def label(self) -> str:
        """`full`, or `partial (…)` with all reasons."""
        return f"partial ({', '.join(self.reasons)})" if self.reasons else "full"

    def folder(self, study: str, budget: str) -> Path:
        """Return the folder of the study's tables and figures: `out/study`, or for a partial study its subfolder for the budget."""
        out = self.options.out / study
        return out / "partial" / budget if self.reasons else out


Prepare = Callable[[Sequence[StudyRun]], tuple[list[Failure], list[StudyRun]]]
"""A function that provides the data of runs before they start. Returns the failures, and the runs that can start."""


def run_study(
    options: OptionsT,
    runs: Sequence[StudyRun],
    file: RecordFile | None,
    *,
    usable: Callable[[Record], bool],
    say: Callable[[str], None],
    reasons: Sequence[str] = (),
    prepare: Prepare = lambda runs: ([], list(runs)),
) -> Results[OptionsT]:
    """Run the missing runs within the budget, bases before their refiners, and return the results of all runs.

    `reasons` make the study partial. A record is appended to `file` when a run finishes. Raises ConfigError if directories or
    records hold runs of other settings, or if no run has a `usable` record.
    """
    records = {} if file is None else file.read()
    conflicts = [line for run in runs for line in _conflicts(run, file, records.get(run.key))]
    if conflicts:
        more = f" (and {len(conflicts) - _SHOWN} more)" if len(conflicts) > _SHOWN else ""
        raise ConfigError(
            [
                *conflicts[:_SHOWN],
                f"runs: {options.runs} or {options.out} holds runs of other settings{more}. Fix: choose another --runs or --out",
            ]
        )

    def keep(run: StudyRun) -> None:
        record = None if file is None or run.key in records else _read(run)
        if file is not None and record is not None:
            file.append(run.key, record)

    for run in runs:
        if run.spec.finished:
            keep(run)
    missing = [run for run in runs if run.key not in records and not run.spec.finished]
    say(f"{len(runs) - len(missing)} of {len(runs)} runs are finished")
    failures, ready = prepare(_wanted(missing))
    by_spec = {run.spec: run for run in ready}
    engine = local(options.jobs, seconds=None if options.budget is None else 60 * options.budget)
    failures += run_sweep(list(by_spec), engine, say=say, done=lambda spec: keep(by_spec[spec]))
    if file is not None:
        records = file.read()
    found = [(run, records.get(run.key) or _read(run)) for run in runs]
    results = tuple(Result(run, record) for run, record in found if record is not None and usable(record))
    if not results:
        lines = [f"{failure.run.name}: {failure.reason} (full log: {failure.run.log})" for failure in failures]
        raise ConfigError([*lines, f"runs: no results in {options.runs}. Fix: give a larger --budget"])
    ended = sum(result.finished for result in results)
    state = () if ended == len(runs) else (f"{ended} of {len(runs)} runs finished",)
    tasks, methods = dict.fromkeys(run.task for run in runs), {run.method.label: run.method for run in runs}
    return Results(options, tuple(tasks), tuple(methods.values()), results, (*reasons, *state), tuple(failures))


def _wanted(missing: Sequence[StudyRun]) -> list[StudyRun]:
    """Return the missing runs, and the bases that they need on this machine."""
    found: dict[str, StudyRun] = {}
    for run in missing:
        wanted: StudyRun | None = run
        while wanted is not None and not wanted.spec.finished:
            found[wanted.key] = wanted
            wanted = wanted.base
    return list(found.values())


def _read(run: StudyRun) -> Record | None:
    """Read the record of the run's directory, with the command of the study; None if there is no run."""
    if not (run.spec.folder / "config.yaml").exists():
        return None
    record = read_run(run.spec.folder)
    return record and replace(record, command=shlex.join(["difftori", *run.spec.words]))


def _conflicts(run: StudyRun, file: RecordFile | None, record: Record | None) -> list[str]:
    """Return the differences of the run's directory and record from the requested run, and from each other, one line each."""
    here, faults = _read(run), list[str]()
    if here is None and record is None:
        return faults
    wanted = comparable(run.config.model_dump(mode="json"))
    for place, found in ((str(run.spec.folder), here), (f"{file and file.path}, {run.key}", record)):
        if found is not None:
            faults += [f"{fault} in {place}" for fault in config_mismatch(wanted, found.config)]
    if here is None or record is None or here.summary is None or faults:
        return faults
    if [(row["step"], row[RETURN]) for row in here.returns] != [(row["step"], row[RETURN]) for row in record.returns]:
        line = f"{run.spec.folder} and {file and file.path} hold different runs of {run.spec.name}"
        faults.append(f"{line}. Fix: remove the invalid one")
    return faults


def config_mismatch(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return the differences of a run's configuration from the requested `comparable` values."""
    try:
        there = comparable(config)
    except ConfigError as error:
        return error.faults
    return [
        f"{key}: {value!r} requested, {there.get(key)!r}" for key, value in wanted.items() if value != there.get(key)
    ]


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without machine and paths, with data by their name. Raises ConfigError if it is invalid."""
    trainer = trainer_of(config)
    given = {**config, "device": "cpu"} | ({"base": None} if trainer.key == "policy" else {})
    plain = trainer.parse(given).model_dump(mode="json")
    found = {name: value for name, value in plain.items() if name not in _NOT_COMPARED[trainer.key]}
    if plain.get("demos"):
        data = PUBLIC[plain["demos"]].folder if plain["demos"] in PUBLIC else plain["demos"]
        found["data"] = Path(data).name
    return flat(found)
