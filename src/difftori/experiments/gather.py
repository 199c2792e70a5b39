"""Reads runs for a report from run directories and from the record files of studies."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from difftori.errors import ConfigError, DataError, DifftoriError
from difftori.experiments.naming import data_path, distinguished, shown, task_names, told_apart
from difftori.experiments.plan import FAILED
from difftori.experiments.records import (
    RETURN,
    SOFTWARE,
    VALIDATION_ERROR,
    Record,
    RecordFile,
    is_record_file,
    read_run,
)
from difftori.runs.checkpoint import read_weights
from difftori.runs.page import MEDIA, evaluations_since_training
from difftori.runs.records import MODEL, current_config, flat, is_finished, read_metrics
from difftori.types import Metrics

TRAINING = "train/return"
SUCCESS = "eval/success"
_UNREADABLE = (DifftoriError, OSError, KeyError, IndexError, TypeError, ValueError, AttributeError)
_WITHIN_A_RUN = ("checkpoints", "tensorboard", "episodes", "media", "wandb")
DATA = ("demos", "episodes", "data_seed")
"""Keys of the data, which distinguish methods where runs of one method, task and seed differ in them."""


@dataclass(frozen=True)
class Measure:
    """A measure to compare runs by. `full` is the value that is normalised to 1; None: tasks are not averaged."""

    name: str
    full: float | None
    higher_is_better: bool = True


@dataclass(frozen=True)
class RunResult:
    """A run, finished or not.

    `outcomes` are its final results by measure; `episodes` those of each evaluation episode, if known, with `episode_seeds`.
    `curve` has the steps (k) and values (k) of its evaluations, and `training` those of the training episodes of an agent
    that has fewer than two evaluations so far. `updates` is the number of updates of a finished run.
    """

    place: Path
    task: str
    method: str
    seed: int
    config: Mapping[str, Any]
    finished: bool
    outcomes: Mapping[Measure, float]
    episodes: Mapping[Measure, np.ndarray]
    episode_seeds: tuple[int, ...]
    curve: tuple[np.ndarray, np.ndarray]
    training: tuple[np.ndarray, np.ndarray]
    curve_name: str
    rule: str
    hardware: str
    versions: Mapping[str, str]
    command: str
    seconds: float | None
    updates: int | None
    images: tuple[Path, ...]

    def by_episode(self, measure: Measure) -> dict[tuple[int, ...], float]:
        """Return the results of the evaluation episodes by their identity: their seed, or without seeds their number.

        Runs of one seed with the same number of episodes start them alike.
        """
        values = self.episodes.get(measure, np.zeros(0)).tolist()
        if self.episode_seeds:
            return {(seed,): value for seed, value in zip(self.episode_seeds, values, strict=False)}
        return {(len(values), number): value for number, value in enumerate(values)}


_Identity: TypeAlias = tuple[str, str, int]


def _identity(run: RunResult) -> _Identity:
    return run.task, run.method, run.seed


@dataclass(frozen=True)
class Gathered:
    """All runs, and the places that were excluded, with the reason."""

    runs: tuple[RunResult, ...]
    left_out: tuple[tuple[Path, str], ...]


def gather(places: Sequence[Path], evaluation: Literal["training", "latest"] = "training") -> Gathered:
    """Read every run in and below `places`. Methods are named by the settings that distinguish them on some task.

    `evaluation`: results from the end of the training, or from the latest `difftori eval` of each run; a finished run without one is
    excluded then. Of two runs with the same method, task and seed, one is excluded: that which is not finished, or else the later
    one in the order of paths. Data distinguish methods only where such runs differ in them. Raises ConfigError if there is no run.
    """
    missing = [f"{place}: does not exist. Fix: give directories of runs" for place in places if not place.exists()]
    if missing:
        raise ConfigError(missing)
    records: dict[Path, Record] = {}
    runs, left_out = [], []
    for place in _places(places):
        if place.name.endswith(FAILED):
            # it may have been trained again since
            if not is_finished(place.with_name(place.name.removesuffix(FAILED))):
                left_out.append((place, _failure(place)))
            continue
        try:
            records |= _records(place, evaluation)
        except _UNREADABLE as error:
            left_out.append((place, str(error) or repr(error)))
    bases = _base_names(records)
    tasks = task_names({place: record.config for place, record in records.items()})
    for place, record in records.items():
        try:
            runs.append(_run(place, record, bases.get(place), tasks[place]))
        except _UNREADABLE as error:
            left_out.append((place, str(error) or repr(error)))
    named = _named(runs)
    kept: dict[_Identity, RunResult] = {}
    for run in sorted(named, key=lambda run: not run.finished):
        first = kept.setdefault(_identity(run), run)
        if first is not run:
            left_out.append((run.place, f"the same method, task and seed as {first.place}"))
    if not kept:
        lines = [f"{place}: {reason}" for place, reason in left_out]
        raise ConfigError([*lines, f"no runs in {', '.join(map(str, places))}. Fix: give directories of runs"])
    return Gathered(tuple(run for run in named if kept[_identity(run)] is run), tuple(left_out))


def _places(places: Sequence[Path]) -> list[Path]:
    """Return the run directories and record files in and below `places`, each once, sorted."""
    found: dict[Path, Path] = {}
    for place in places:
        if place.is_file():
            found.setdefault(place.resolve(), place)
            continue
        for folder, names in _folders(place):
            if "config.yaml" in names and not (folder / MODEL).exists():  # not a published folder
                found.setdefault(folder.resolve(), folder)
            for path in (folder / name for name in names if name.endswith(FAILED)):
                found.setdefault(path.resolve(), path)
            for path in (folder / name for name in names if name.endswith(".jsonl")):
                if is_record_file(path):
                    found.setdefault(path.resolve(), path)
    return sorted(found.values())


def _failure(note: Path) -> str:
    """Return why a run of a sweep failed, from the note beside its folder."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        plain = json.loads(note.read_bytes())
        return f"the run failed with status {plain['status']}: {plain['reason']}"
    return "the run failed"


def _folders(place: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder in and below `place`, also behind links, with the names of its files. A run's checkpoints and logs are skipped."""
    seen = set[str]()
    for folder, below, files in os.walk(place, followlinks=True):
        below[:] = [name for name in below if not ("config.yaml" in files and name in _WITHIN_A_RUN)]
        if (real := os.path.realpath(folder)) in seen:
            below.clear()  # a link to a folder above
        seen.add(real)
        yield Path(folder), files


def _records(place: Path, evaluation: str) -> dict[Path, Record]:
    """Read the records of a run directory or a record file; empty if another program wrote it."""
    if place.is_file():
        if evaluation == "latest":
            raise DataError("records of studies have no later evaluation. Fix: report --evaluation training")
        return {place / name: record for name, record in RecordFile(place).read().items()}
    record = read_run(place)
    if record is not None and record.summary is not None and evaluation == "latest":
        record = _evaluated_again(place, record, record.summary)
    return {} if record is None else {place: record}


def _evaluated_again(place: Path, record: Record, summary: Metrics) -> Record:
    """Return the record of a finished run with the results of its latest evaluation after training."""
    evaluations = evaluations_since_training(place)
    if not evaluations:
        raise DataError(
            "it was not evaluated after its training. Fix: difftori eval RUN, or report --evaluation training"
        )
    latest = evaluations[-1]
    values = {name: math.nan if value is None else float(value) for name, value in latest["metrics"].items()}
    count = len(next(iter(latest["episodes"].values()), ()))
    changes = {"eval_seed" if name == "seed" else name: value for name, value in latest.get("changes", {}).items()}
    config = {**record.config, **changes, **({"eval_episodes": count} if count else {})}
    if "agent" in record.config:
        results = {name.removeprefix("eval/"): values[name] for name in (RETURN, SUCCESS) if name in values}
        episodes = {"last": latest["episodes"]}
        # this evaluation's success, if it has one, and not that of the training
        rows = tuple({name: value for name, value in row.items() if name != SUCCESS} for row in record.evaluations)
        return replace(record, config=config, summary={**summary, **results}, evaluations=rows, episodes=episodes)
    which = latest["weights"]
    other = {name: value for name, value in summary.items() if not name.startswith(("last/", "best/"))}
    results = {f"{which}/{name}": value for name, value in values.items()}
    return replace(record, config=config, summary={**other, **results}, episodes={which: latest["episodes"]})


def _base_names(records: Mapping[Path, Record]) -> dict[Path, str]:
    """Return the name of each refiner's base policy: `bc`, or `bc (updates 1500)` if the refiners have bases with different settings."""
    trained = {record.weights: record for record in records.values() if record.weights}
    configs: dict[Path, tuple[str, Mapping[str, Any]]] = {}
    for place, record in records.items():
        if record.config.get("base"):
            base = trained.get(record.base_weights or "")
            config = _stored_base(place, record) if base is None else base.config
            configs[place] = (str(record.config.get("env")), config)
    named = distinguished([(str(config.get("policy")), task, flat(config)) for task, config in configs.values()])
    return {
        place: f"{name} ({', '.join(words)})" if words else name
        for place, (name, words) in zip(configs, named, strict=True)
    }


def _stored_base(place: Path, record: Record) -> Mapping[str, Any]:
    """Return the configuration of a base whose run is not among the others: from the copy in the refiner's run, if it is there."""
    if (place / "base.pt").exists():
        with contextlib.suppress(DifftoriError, KeyError, TypeError):
            return current_config(read_weights(place / "base.pt")["config"])
    weights = record.base_weights
    return {"policy": f"a base with weights {weights[:8]}" if weights else str(record.config["base"])}


def _run(place: Path, record: Record, base: str | None, task: str) -> RunResult:
    config, summary = record.config, record.summary
    agent = "agent" in config
    curve_name = RETURN if agent else VALIDATION_ERROR
    rows = [row for row in record.evaluations if row.get(curve_name) is not None]
    early = (
        [row for row in read_metrics(place) if TRAINING in row] if agent and len(rows) < 2 and place.is_dir() else []
    )
    outcomes: dict[Measure, float] = {}
    episodes: dict[Measure, np.ndarray] = {}
    seeds: tuple[int, ...] = ()
    rule = "last weights" if agent else ""
    if summary is not None and agent:
        outcomes[Measure("return", _full_return(config))] = summary["return"]
        success = summary.get("success", rows[-1].get(SUCCESS) if rows else None)
        if success is not None:
            outcomes[Measure("success", 1.0)] = success
        episodes = _by_measure(outcomes, record.episodes.get("last", {}))
    elif summary is not None:
        which = "last" if any(name.startswith("last/") and "validation" not in name for name in summary) else "best"
        rule = "last weights" if which == "last" else "weights of least validation error"
        outcomes = _outcomes(summary, which)
        known = record.episodes.get(which, {})
        episodes = _by_measure(outcomes, known)
        seeds = tuple(int(seed) for seed in known.get("seed", ()))
    broken = [measure.name for measure, value in outcomes.items() if not math.isfinite(value)]
    if broken:
        raise DataError(f"its {', '.join(broken)} is NaN or Inf")
    if not isinstance(config["env"], str) or not isinstance(config["seed"], int):
        raise DataError(f"env {config['env']!r} or seed {config['seed']!r} is invalid")
    name = config.get("agent") or config["policy"]
    return RunResult(
        place=place,
        task=task,
        method=f"{name} on {base}" if base else name,
        seed=config["seed"],
        config=flat(config),
        finished=summary is not None,
        outcomes=outcomes,
        episodes=episodes,
        episode_seeds=seeds,
        curve=_curve(rows, curve_name),
        training=_curve(early, TRAINING),
        curve_name=curve_name,
        rule=rule,
        hardware=record.hardware,
        versions={name: str(record.versions[name]) for name in SOFTWARE if record.versions.get(name)},
        command=record.command,
        seconds=None if summary is None else summary.get("seconds"),
        updates=None if summary is None or "updates" not in summary else int(summary["updates"]),
        images=tuple(path for path in sorted((place / "media").glob("*")) if path.suffix in MEDIA),
    )


def _by_measure(measures: Iterable[Measure], columns: Mapping[str, Sequence[float | int]]) -> dict[Measure, np.ndarray]:
    """Return the results of each evaluation episode, of the measures that are recorded."""
    return {measure: np.array(columns[measure.name], dtype=float) for measure in measures if measure.name in columns}


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row["step"] for row in rows]), np.array([row[name] for row in rows], dtype=float)


def _full_return(config: Mapping[str, Any]) -> float | None:
    """Return the largest possible return of an episode; None if unknown for the environment family.

    An episode of DeepMind Control has 1000 steps, or as many as the run limits it to, of a reward of at most 1.
    """
    family = config["env"].partition(":")[0]
    return {"dmc": float(min(config.get("max_episode_steps") or 1000, 1000)), "probe": 1.0}.get(family)


def _outcomes(summary: Mapping[str, float], which: str) -> dict[Measure, float]:
    known = (
        Measure("success", 1.0),
        Measure("score", 1.0),
        *(Measure(name, None, higher_is_better=False) for name in ("excess_cost", "action_error")),
    )
    found = {m: summary[f"{which}/{m.name}"] for m in known if f"{which}/{m.name}" in summary}
    return found or {Measure("validation_error", None, False): summary[f"{which}/validation_error"]}


def _named(runs: Sequence[RunResult]) -> list[RunResult]:
    """Append to each method's name the settings in which runs of that name differ, and on a task, the data in which they do."""
    found = distinguished([(run.method, run.task, run.config) for run in runs])
    named = [replace(run, method=", ".join([name, *words])) for run, (name, words) in zip(runs, found, strict=True)]
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for run in named:
        groups.setdefault((run.task, run.method), []).append(run)
    words = {key: _data_words(group) for key, group in groups.items()}
    return [replace(run, method=", ".join([run.method, *words[run.task, run.method][run.place]])) for run in named]


def _data_words(group: Sequence[RunResult]) -> dict[Path, list[str]]:
    """Return for runs of one method and task the data in which those of the same seed differ, by place; nothing if none do."""
    values = {key: [run.config.get(key) for run in group] for key in DATA}
    values["demos"] = data_names(group)
    first: dict[int, int] = {}
    alike = [(first.setdefault(run.seed, number), number) for number, run in enumerate(group)]
    keys = [key for key in DATA if any(values[key][a] != values[key][b] for a, b in alike)]
    return {run.place: [f"{key} {shown(values[key][number])}" for key in keys] for number, run in enumerate(group)}


def data_names(group: Sequence[RunResult]) -> list[str]:
    """Return the names of the data sets of runs. One set for each seed has one name, with SEED in the place of the seed."""
    paths = [data_path(run.config) for run in group]
    of_seeds = [re.sub(rf"(?<!\d){run.seed}(?!\d)", "SEED", path) for run, path in zip(group, paths, strict=True)]
    if len(set(of_seeds)) < len(set(paths)):
        paths = of_seeds
    names = told_apart(paths)
    return [names[path] for path in paths]
