"""Records of runs: read from run directories, and kept in one file per study.

Run directories stay on the machine that made them. A study appends to its record file when a run finishes, so that it can be
resumed elsewhere, and drawn again from the repository alone.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from difftori.errors import DataError
from difftori.runs.records import current_config, read_config, read_metrics, read_summary
from difftori.types import Metrics

RETURN, VALIDATION_ERROR = "eval/return", "validation/error"
SOFTWARE = ("difftori", "git_commit", "torch", "numpy", "python")


@dataclass(frozen=True)
class Record:
    """What a run left, finished or not.

    `summary` is None until the run is finished. `evaluations` are the logged rows that have a return or a validation error, to six
    digits. `episodes` holds the columns of the final evaluation's episodes by `last` or `best`. `weights` and `base_weights` are digests of
    what was learned and of the base policy.
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
        """The evaluations that have a return."""
        return [row for row in self.evaluations if RETURN in row]


def read_run(folder: Path) -> Record | None:
    """The record of a run directory; None if another program wrote it. DataError or ConfigError if it is damaged."""
    config = read_config(folder)
    if "agent" not in config and "policy" not in config:
        return None
    machine = _mapping(folder / "versions.json")
    try:
        hardware = f"{machine.get('device_name') or machine['cpu']}, {machine['threads']} thread(s)"
    except KeyError as error:
        raise DataError(f"{folder / 'versions.json'}: lacks {error}; it is written when a run starts") from error
    episodes, commands = folder / "episodes.json", folder / "command.txt"
    return Record(
        config=config,
        hardware=f"{hardware}, {machine['platform']}" if "platform" in machine else hardware,
        versions={name: machine.get(name) for name in SOFTWARE},
        command=commands.read_text().partition("\n")[0].partition("  ")[2] if commands.exists() else "",
        summary=read_summary(folder) if (folder / "summary.json").exists() else None,
        evaluations=tuple(
            _short(row) for row in read_metrics(folder) if RETURN in row or row.get(VALIDATION_ERROR) is not None
        ),
        episodes=_mapping(episodes) if episodes.exists() else {},
        weights=_digest(folder / "policy.pt"),
        base_weights=_digest(folder / "base.pt"),
    )


@dataclass(frozen=True)
class RecordFile:
    """The finished runs of a study: JSON lines, each with the name of its run."""

    path: Path

    def read(self) -> dict[str, Record]:
        """The records by the names of their runs. DataError if a line is damaged; a last line that a kill cut short is left out."""
        if not self.path.exists():
            return {}
        found: dict[str, Record] = {}
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                name, record = _parsed(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{self.path}, line {number}: no readable run ({error}); restore it, or remove it to run again"
                ) from error
            found[name] = record
        return found

    def append(self, name: str, record: Record) -> None:
        """Add a finished run, unless its name is there. Processes may append at the same time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            _wait_for(file)
            file.seek(0)
            before = file.read()
            before = before[: before.rfind(b"\n") + 1]
            file.truncate(len(before))  # without a last line that a kill cut short
            if any(line.startswith(_head(name)) for line in before.splitlines()):
                return
            plain = {**asdict(record), "evaluations": record.returns}
            plain["summary"] = {k: v if math.isfinite(v) else None for k, v in (record.summary or {}).items()}
            file.write(_head(name) + json.dumps(plain)[1:].encode() + b"\n")


def is_record_file(path: Path) -> bool:
    """Whether a file holds a study's records, judging by its first characters."""
    with path.open("rb") as file:
        return file.read(8) == b'{"run": '


def _head(name: str) -> bytes:
    """How the line of a run begins."""
    return f'{{"run": {json.dumps(name)}, '.encode()


def _parsed(plain: dict[str, Any]) -> tuple[str, Record]:
    name, episodes = plain.pop("run"), plain.get("episodes", {})
    for which, columns in episodes.items():
        if len({len(values) for values in columns.values()}) > 1:
            raise ValueError(f"the columns of its {which} episodes differ in length")
    summary = {key: math.nan if value is None else float(value) for key, value in plain["summary"].items()}
    config = current_config(plain["config"])
    return name, Record(
        **{**plain, "config": config, "summary": summary, "evaluations": tuple(plain.get("evaluations", ()))}
    )


def _wait_for(file: IO[bytes]) -> None:
    """Keep other processes out until the file closes. Windows has no flock."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def _mapping(source: Path) -> dict[str, Any]:
    try:
        found = json.loads(source.read_bytes())
        if not isinstance(found, dict):
            raise TypeError("no mapping")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{source}: unreadable ({error}); restore it, or remove the run to train again") from error
    return found


def _short(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers to six digits; NaN, which JSON lacks, as None."""
    return {
        name: (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in values.items()
    }


def _digest(weights: Path) -> str | None:
    """The digest that stands beside exported weights."""
    beside = weights.with_name(f"{weights.name}.sha256")
    return beside.read_text().split()[0] if beside.exists() else None
