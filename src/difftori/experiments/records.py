"""Records of runs, read from run directories, and stored in one file per study.

Run directories stay on the machine that trained them. A study appends a record to its file when a run finishes, so that it can
be resumed on another machine, and its tables and figures can be created from the repository alone.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from difftori.errors import DataError
from difftori.runs.process import wait_for
from difftori.runs.records import current_config, current_metrics, is_finished, read_config, read_metrics, read_summary
from difftori.trainers import LENGTHS
from difftori.types import Metrics

T = TypeVar("T")
RETURN, VALIDATION_ERROR = "eval/return", "validation/error"
SOFTWARE = ("difftori", "git_commit", "torch", "numpy", "python")


def due_steps(steps: np.ndarray, every: int, last: int) -> np.ndarray:
    """Return when evaluations at these steps (k) were due: at multiples of `every`, and at the end, because they wait for the end of an episode.

    An evaluation at the earlier end of a run that was extended was not due; it keeps its step.
    """
    due = np.where(steps >= last, last, steps // every * every)
    return np.where(np.diff(due, prepend=-1) == 0, steps, due)


@dataclass(frozen=True)
class Record:
    """The record of a run, finished or not.

    `summary` is None until the run is finished. `evaluations` are the logged rows with a return or a validation error, to six
    digits. `episodes` has the columns of the final evaluation's episodes, by `last` or `best`. `weights` and `base_weights` are
    digests of the trained weights and of the base policy's.
    """

    config: Mapping[str, Any]
    hardware: str
    versions: Mapping[str, str | None]
    command: str
    summary: Metrics | None = None
    evaluations: tuple[dict[str, Any], ...] = ()
    episodes: Mapping[str, Mapping[str, list[float | int]]] = field(default_factory=dict)
    weights: str | None = None
    base_weights: str | None = None

    @property
    def returns(self) -> list[dict[str, Any]]:
        """The evaluations with a return."""
        return [row for row in self.evaluations if RETURN in row]


def read_run(folder: Path) -> Record | None:
    """Read the record of a run directory; None if another program wrote it. Raises DataError or ConfigError if it is damaged."""
    config = read_config(folder)
    if "agent" not in config and "policy" not in config:
        return None
    machine = _mapping(folder / "versions.json")
    try:
        hardware = f"{machine.get('device_name') or machine['cpu']}, {machine['threads']} thread(s)"
    except KeyError as error:
        raise DataError(
            f"{folder / 'versions.json'}: {error} is missing. Fix: restore the file, or remove the run and train again"
        ) from error
    episodes, commands = folder / "episodes.json", folder / "command.txt"
    return Record(
        config=config,
        hardware=f"{hardware}, {machine['platform']}" if "platform" in machine else hardware,
        versions={name: machine.get(name) for name in SOFTWARE},
        command=_command(commands.read_text()) if commands.exists() else "",
        summary=read_summary(folder) if is_finished(folder) else None,
        evaluations=tuple(
            _short(row) for row in read_metrics(folder) if RETURN in row or row.get(VALIDATION_ERROR) is not None
        ),
        episodes=_mapping(episodes) if episodes.exists() else {},
        weights=_digest(folder / "policy.pt"),
        base_weights=_digest(folder / "base.pt"),
    )


@dataclass(frozen=True)
class RecordFile:
    """The finished runs of a study, as JSON lines, each with the name of its run."""

    path: Path

    def read(self) -> dict[str, Record]:
        """Read the records by the names of their runs. An incomplete last line is ignored. Raises DataError if another line is damaged."""
        return dict(read_lines(self.path, lambda line: _parsed(json.loads(line))))

    def append(self, name: str, record: Record) -> None:
        """Append a finished run, unless the file has its name. Safe for concurrent processes."""
        plain = {**asdict(record), "evaluations": record.returns}
        plain["summary"] = {k: v if math.isfinite(v) else None for k, v in (record.summary or {}).items()}
        append_line(self.path, _head(name), json.dumps(plain)[1:].encode())


def read_lines(path: Path, parse: Callable[[bytes], T | None]) -> list[T]:
    """Read the records of a file, if it exists, without those that `parse` returns None for. An incomplete last line is ignored.

    Raises DataError if `parse` raises an error for another line.
    """
    found: list[T] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = parse(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: not a valid record ({error}). Fix: restore the line, or remove it to run again"
            ) from error
        if record is not None:
            found.append(record)
    return found


def append_line(path: Path, head: bytes, rest: bytes) -> None:
    """Append a line to a file, unless one of its lines begins with `head`. Safe for concurrent processes, and for kills."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        wait_for(file)
        file.seek(0)
        before = file.read()
        before = before[: before.rfind(b"\n") + 1]
        file.truncate(len(before))  # remove an incomplete last line, left by a killed process
        if not any(line.startswith(head) for line in before.splitlines()):
            file.write(head + rest + b"\n")


def is_record_file(path: Path) -> bool:
    """Return whether a file holds a study's records, from its first characters."""
    with path.open("rb") as file:
        return file.read(8) == b'{"run": '


def _head(name: str) -> bytes:
    """Return the beginning of a run's line."""
    return f'{{"run": {json.dumps(name)}, '.encode()


def _parsed(plain: dict[str, Any]) -> tuple[str, Record]:
    name, episodes = plain.pop("run"), plain.get("episodes", {})
    for which, columns in episodes.items():
        if len({len(values) for values in columns.values()}) > 1:
            raise ValueError(f"the columns of its {which} episodes differ in length")
    summary = current_metrics(plain["summary"])
    current = {
        "config": current_config(plain["config"]),
        "summary": {key: math.nan if value is None else float(value) for key, value in summary.items()},
        "evaluations": tuple(map(current_metrics, plain.get("evaluations", ()))),
    }
    return name, Record(**{**plain, **current})


def _mapping(source: Path) -> dict[str, Any]:
    try:
        found = json.loads(source.read_bytes())
        if not isinstance(found, dict):
            raise TypeError("not a mapping")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{source}: unreadable ({error}). Fix: restore it, or remove the run and train again"
        ) from error
    return found


def _command(lines: str) -> str:
    """Return the command of a run: its first one, and those that extended it, from `command.txt`."""
    first, *later = [line.partition("  ")[2] for line in lines.splitlines()] or [""]
    longer = [line for line in later if "--resume" in line and re.search(rf"--({'|'.join(LENGTHS)})\b", line)]
    return " && ".join([first, *longer])


def _short(values: dict[str, Any]) -> dict[str, Any]:
    """Round floats to six digits. NaN becomes None, because JSON has no NaN."""
    return {
        name: (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in values.items()
    }


def _digest(weights: Path) -> str | None:
    """Return the digest stored next to exported weights."""
    beside = weights.with_name(f"{weights.name}.sha256")
    return beside.read_text().split()[0] if beside.exists() else None
