"""The evidence of a run: its evaluations with intervals, its training and its data, without paths of this machine."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difftori.errors import DataError
from difftori.experiments.statistics import Estimate, student_interval, student_quantile
from difftori.il.recorded import read_record
from difftori.il.weights import Which
from difftori.rollout import wilson_interval
from difftori.runs.figures import RESULTS
from difftori.runs.page import evaluations_since_training
from difftori.runs.records import flat, is_finished, read_config, read_metrics, read_summary
from difftori.types import Metrics

_COUNTS = ("seed", "episode", "episodes", "updates")
"""Metrics and columns that are no results."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a run: `config`, `summary` (empty if unfinished), `evaluations`, `data`, `versions`, `commands`."""

    config: dict[str, Any]
    summary: Metrics
    evaluations: list[dict[str, Any]]
    data: Mapping[str, Any]
    versions: dict[str, Any]
    commands: list[str]

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return bool(self.summary)

    @property
    def largest(self) -> dict[str, Any] | None:
        """The evaluation with the most episodes, the latest of them; None if there is none."""
        return max(
            reversed(self.evaluations), key=lambda found: (not found.get("changes"), found["count"]), default=None
        )


def gather(run: Path, which: Which) -> Evidence:
    """Read the evidence for these weights of a run. Raises ConfigError or DataError for damaged files."""
    config = read_config(run)
    finished = is_finished(run)
    found = []
    if finished:
        found = [_of_agent(run) if "agent" in config else _of_policy(run, which), *_later(run, which)]
    return Evidence(
        without_paths(config),
        read_summary(run) if finished else {},
        [evaluation for evaluation in found if evaluation is not None],
        without_paths(dict(read_record(run))),
        _versions(run / "versions.json"),
        _commands(run / "command.txt"),
    )


def without_paths(value: Any) -> Any:
    """Return plain values in which every path is replaced by its last part, at any depth. Keys of data are no paths: `obs/object`."""
    if isinstance(value, Mapping):
        return {name: item if name in _DATA_KEYS else without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return _last_part(value) if isinstance(value, str) else value


_DATA_KEYS = ("obs_keys", "action_key")


def _last_part(text: str) -> str:
    """Return `demos.zarr` of `/home/me/demos.zarr`, and `NAME=demos.zarr` of `NAME=/home/me/demos.zarr`. `gym:ALE/Pong-v5` is no path."""
    name, equals, value = text.rpartition("=") if re.match(r"[\w.-]+=", text) else ("", "", text)
    if not re.match(r"[/\\~]|\.+[/\\]|[A-Za-z]:[/\\]|file:", value):  # not certainly a path
        if re.search(r"\s", value):
            return re.sub(r"(?<![\w:])(?:~|[A-Za-z]:)?[/\\]\S*", "…", text)
        if not re.search(r"[/\\]", value) or re.match(r"\w\w+:", value):
            return text
    parts = [part for part in re.split(r"[/\\]", value) if part not in ("", "~", ".", "..", "file:")]
    return name + equals + (parts[-1] if parts else "…")


def _of_policy(run: Path, which: Which) -> dict[str, Any] | None:
    """Return the evaluation at the end of a policy's training."""
    prefix = f"{which}/"
    metrics = {n.removeprefix(prefix): v for n, v in read_summary(run).items() if n.startswith(prefix)}
    metrics.pop("validation_error", None)
    source = run / "episodes.json"
    try:
        episodes = json.loads(source.read_bytes()).get(which, {}) if source.exists() else {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{source}: unreadable ({error}). Fix: restore it, or move it away") from error
    return evaluated("at the end of training", which, metrics, episodes)


def _of_agent(run: Path) -> dict[str, Any] | None:
    """Return the last evaluation of an agent's training, of which the log has the mean and the standard deviation."""
    rows = [row for row in read_metrics(run) if row.get("eval/return") is not None]
    if not rows:
        return None
    metrics = {name.removeprefix("eval/"): value for name, value in rows[-1].items() if name.startswith("eval/")}
    kept = {name: metrics[name] for name in ("return", "return_std", "length", "episodes") if name in metrics}
    return evaluated("at the end of training", "last", kept, {})


def _later(run: Path, which: Which) -> list[dict[str, Any]]:
    """Return the evaluations by `difftori eval` of these weights since the end of the training."""
    found = []
    for entry in evaluations_since_training(run):
        try:
            if entry["weights"] != which:
                continue
            metrics = {name.removeprefix("eval/"): value for name, value in entry["metrics"].items()}
            found.append(evaluated("difftori eval", which, metrics, entry["episodes"], **_circumstances(entry)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{run / 'eval.json'}: not a list of evaluations ({error!r}). Fix: move it away") from error
    return [each for each in found if each is not None]


def _circumstances(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "time": entry["time"],
        "command": _command(str(entry.get("command", ""))),
        "device": entry.get("device"),
        "changes": without_paths(entry.get("changes", {})),
        "versions": _without_executable(entry.get("versions", {})),
    }


def evaluated(
    source: str,
    which: Which,
    metrics: Mapping[str, float | None],
    episodes: Mapping[str, Sequence[float | int]],
    **about: Any,
) -> dict[str, Any] | None:
    """Return an evaluation as it is published: metrics, 95 % intervals, and the results of each episode. None if it has no results."""
    results = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
    count = int(results.get("episodes") or max(map(len, episodes.values()), default=0))
    if not count or not any(name not in _COUNTS for name in results):
        return None
    found = {name: interval(name, value, results, episodes) for name, value in results.items()}
    intervals = {n: [e.low, e.high] for n, e in found.items() if e is not None and e.bounded}
    head = {"source": source, "weights": which, "count": count, **about}
    return {**head, "metrics": results, "intervals": intervals, "episodes": {n: list(v) for n, v in episodes.items()}}


def interval(
    name: str, value: float, metrics: Mapping[str, float], episodes: Mapping[str, Sequence[float | int]]
) -> Estimate | None:
    """Return the 95 % interval of a metric over independent episodes; None if it cannot be computed.

    Wilson's for results that are 0 or 1, Student's for a mean of episodes, such as that of the differences to an expert.
    """
    if name in _COUNTS:
        return None
    column = np.array(episodes.get(name, ()), dtype=float)
    if name == "excess_cost" and {"cost", "expert_cost"} <= episodes.keys():
        return student_interval(np.array(episodes["cost"]) - np.array(episodes["expert_cost"]))
    if len(column) and np.isfinite(column).all() and math.isclose(column.mean(), value, rel_tol=1e-4, abs_tol=1e-6):
        if set(column) <= {0.0, 1.0}:
            return Estimate(value, *wilson_interval(int(column.sum()), len(column)))
        return student_interval(column)
    if len(column) == 0 and f"{name}_std" in metrics and (count := int(metrics.get("episodes", 0))) > 1:
        reach = student_quantile(0.975, count - 1) * metrics[f"{name}_std"] / (count - 1) ** 0.5
        return Estimate(value, value - reach, value + reach)
    return None


def result_names(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the metrics of an evaluation to show, the most important first."""
    names = [
        n for n in evaluation["metrics"] if n not in _COUNTS and not n.endswith(("_low", "_high", "_stderr", "_std"))
    ]
    return sorted(names, key=lambda name: RESULTS.index(name) if name in RESULTS else len(RESULTS))


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return all settings of a run, by dotted names, without those that are not set."""
    return {name: str(value) for name, value in flat(config).items() if value is not None}


def _versions(source: Path) -> dict[str, Any]:
    try:
        return _without_executable(json.loads(source.read_bytes())) if source.exists() else {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{source}: unreadable ({error}). Fix: restore it, or move it away") from error


def _without_executable(versions: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in versions.items() if name not in ("executable", "earlier")}
    earlier = [_without_executable(each) for each in versions.get("earlier", [])]
    return without_paths(kept) | ({"earlier": earlier} if earlier else {})


def _commands(source: Path) -> list[str]:
    """Return the commands that started a run, without their times and paths."""
    if not source.exists():
        return []
    lines = [line.split(maxsplit=1) for line in source.read_text(errors="replace").splitlines()]
    return list(dict.fromkeys(_command(line[1]) for line in lines if len(line) == 2))


def _command(line: str) -> str:
    """Return a command with `difftori` in place of the program's path, and the last parts of other paths."""
    try:
        words = shlex.split(line)
    except ValueError:
        return ""
    kept, option = [], ""
    for word in words[1:]:
        option = word.lstrip("-").replace("-", "_") if word.startswith("--") else option
        kept.append(word if option in _DATA_KEYS else _last_part(word))
    return shlex.join(["difftori", *kept]) if words else ""
