"""What all studies share: the methods that they compare, the runs that these need, and the results that came of them."""

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
from difftori.experiments.records import RETURN, Record, RecordFile, read_run
from difftori.experiments.sweep import local, run_sweep
from difftori.runs.records import flat
from difftori.trainers import trainer_of

_SHOWN = 8
_NOT_COMPARED = {
    "policy": {"device", "threads", "save_every", "num_envs", "workers", "base", "demos"},
    "agent": {"device", "threads", "save_every", "compile", "workers", "storage", "keep_episodes"},
}
"""Keys of a run's configuration that do not decide what is compared: where and how it computed, and paths."""


class StudyOptions(BaseModel):
    """Options that all studies share."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    jobs: int = Field(1, ge=1)
    """Number of runs at once, each a process with one thread. With more than one, wall-clock times depend on each other."""
    budget: float | None = Field(None, ge=0)
    """Minutes after which no further run is started (default: no limit); runs that have started are finished. 0 only draws what
    exists."""
    device: str = "cpu"
    """Device that runs compute on, such as `cpu` or `cuda`."""
    runs: Path
    """Directory of the runs. Finished runs in it are not repeated, interrupted ones are resumed."""
    out: Path = Path("results")
    """Directory for tables and figures; those of a partial study go to its folder `partial`. Its folder `runs` keeps a record of each
    finished run, so that a study can be resumed, or drawn again, on another machine."""


OptionsT = TypeVar("OptionsT", bound=StudyOptions)


@dataclass(frozen=True)
class Method:
    """What is compared: a policy or an agent with settings of its own. `label` names it in tables and figures."""

    label: str
    trains: str
    """Name of the policy or the agent."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    """Label of the method whose policy it refines."""
    updates: int = 1
    """Length of the training, in the study's number of updates."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of `difftori train`."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: a method on a task from a seed. `key` names it in the study's record file."""

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
        """Whether the run has come to its end."""
        return self.record.summary is not None

    @property
    def summary(self) -> Mapping[str, float]:
        """The finished run's summary."""
        assert self.record.summary is not None
        return self.record.summary

    @cached_property
    def steps(self) -> np.ndarray:
        """Environment steps (k) of the evaluations, on the grid of `eval_every`: an evaluation waits for the end of an episode."""
        every, last = self.run.config.eval_every, self.run.config.steps
        rows = self.record.returns
        return np.array([last if row["step"] >= last else row["step"] // every * every for row in rows])

    @cached_property
    def returns(self) -> np.ndarray:
        """Mean returns (k) of the evaluations. DataError if one is not a number."""
        broken = [row["step"] for row in self.record.returns if row[RETURN] is None]
        if broken:
            where = self.run.spec.folder
            raise DataError(f"{where}: the return at step {broken[0]} is not a number; remove the folder and run again")
        return np.array([row[RETURN] for row in self.record.returns], dtype=np.float64)

    @cached_property
    def seconds(self) -> np.ndarray:
        """Training seconds (k) until each evaluation, without evaluation."""
        return np.array([row["seconds/total"] - row["seconds/evaluation"] for row in self.record.returns])

    @cached_property
    def updates(self) -> np.ndarray:
        """Updates (k) made until each evaluation."""
        return np.array([row["updates"] for row in self.record.returns])

    @property
    def area(self) -> float:
        """The mean of all evaluations, which is the area under the learning curve over its width."""
        return float(self.returns.mean())

    def at(self, steps: int) -> float | None:
        """The return at exactly so many environment steps."""
        found = self.returns[self.steps == steps]
        return float(found[0]) if len(found) else None

    def episodes(self, measure: str) -> np.ndarray:
        """A column (N) of the evaluation episodes of the last weights: `seed`, `success` or `score`."""
        return np.array(self.record.episodes["last"][measure])


@dataclass(frozen=True)
class Results(Generic[OptionsT]):
    """The runs of a study that have results. `reasons` says why it is less than the full study."""

    options: OptionsT
    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    runs: tuple[Result, ...]
    reasons: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()

    def of(self, task: str, label: str) -> dict[int, Result]:
        """The results of a method on a task, by seed."""
        return {r.seed: r for r in self.runs if r.run.task == task and r.run.method.label == label}

    @property
    def label(self) -> str:
        """`full`, or `partial (…)` with all reasons."""
        return f"partial ({', '.join(self.reasons)})" if self.reasons else "full"

    def folder(self, study: str, budget: str) -> Path:
        """Where the study's tables and figures go: `out/study`, or within it a folder of the partial study's budget."""
        out = self.options.out / study
        return out / "partial" / budget if self.reasons else out


Prepare = Callable[[Sequence[StudyRun]], tuple[list[Failure], list[StudyRun]]]
"""Provides what runs need before they start; returns the failures, and the runs that can start."""


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
    """Run what is missing, as far as the budget goes, and read what exists. Base policies come before what refines them.

    `reasons` make the study partial. A record is appended to `file` when a run finishes. ConfigError if directories or records hold runs of other settings, or if no
    run has a `usable` record.
    """
    records = {} if file is None else file.read()
    conflicts = [line for run in runs for line in _conflicts(run, file, records.get(run.key))]
    if conflicts:
        more = f" (and {len(conflicts) - _SHOWN} more)" if len(conflicts) > _SHOWN else ""
        raise ConfigError(
            [*conflicts[:_SHOWN], f"runs: {options.runs} holds runs of other settings{more}; choose another"]
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
        raise ConfigError([*lines, f"runs: nothing to draw in {options.runs}; give a larger --budget"])
    ended = sum(result.finished for result in results)
    state = () if ended == len(runs) else (f"{ended} of {len(runs)} runs finished",)
    tasks, methods = dict.fromkeys(run.task for run in runs), {run.method.label: run.method for run in runs}
    return Results(options, tuple(tasks), tuple(methods.values()), results, (*reasons, *state), tuple(failures))


def _wanted(missing: Sequence[StudyRun]) -> list[StudyRun]:
    """The missing runs, and the bases that they need here."""
    found: dict[str, StudyRun] = {}
    for run in missing:
        wanted: StudyRun | None = run
        while wanted is not None and not wanted.spec.finished:
            found[wanted.key] = wanted
            wanted = wanted.base
    return list(found.values())


def _read(run: StudyRun) -> Record | None:
    """The record of the run's directory, with the study's own command; None if there is none."""
    if not (run.spec.folder / "config.yaml").exists():
        return None
    record = read_run(run.spec.folder)
    return record and replace(record, command=shlex.join(["difftori", *run.spec.words]))


def _conflicts(run: StudyRun, file: RecordFile | None, record: Record | None) -> list[str]:
    """How the run's directory or record differs from what is wanted, or they from each other, one line each."""
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
        faults.append(f"{line}: remove the one that is not to count")
    return faults


def config_mismatch(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """How a run's configuration differs from the `comparable` values that are wanted."""
    try:
        there = comparable(config)
    except ConfigError as error:
        return error.faults
    return [f"{key}: {value!r} wanted, {there.get(key)!r}" for key, value in wanted.items() if value != there.get(key)]


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's outcome: its whole configuration without machine and paths, data by their name. ConfigError if it is invalid."""
    trainer = trainer_of(config)
    given = {**config, "device": "cpu"} | ({"base": None} if trainer.key == "policy" else {})
    plain = trainer.parse(given).model_dump(mode="json")
    found = {name: value for name, value in plain.items() if name not in _NOT_COMPARED[trainer.key]}
    if plain.get("demos"):
        data = PUBLIC[plain["demos"]].folder if plain["demos"] in PUBLIC else plain["demos"]
        found["data"] = Path(data).name
    return flat(found)
