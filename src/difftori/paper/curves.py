"""Reads the published learning curves in `published/`. Its README.md has their origin, licence and conventions."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from difftori.errors import DataError

FOLDER = "published"


@dataclass(frozen=True)
class PublishedCurve:
    """Episode returns (seeds k) of `method` on `task` at `steps` (k) environment steps. NaN if a seed has no point.

    `measure`: `evaluation`, or `training episodes` for returns with exploration. `origin`: repository, path and commit.
    """

    method: str
    observation: str
    task: str
    measure: str
    origin: str
    steps: np.ndarray
    returns: np.ndarray

    def at(self, steps: int) -> np.ndarray:
        """Return the episode returns of all seeds with a point at exactly `steps` environment steps. May be empty."""
        values = self.returns[:, self.steps == steps].ravel()
        return values[np.isfinite(values)]


@dataclass(frozen=True)
class PrintedPoint:
    """A mean that a paper reports without curves: `mean` ± `plus_minus` of `method` after `steps` environment steps."""

    method: str
    observation: str
    task: str
    steps: int
    mean: float
    plus_minus: float
    source: str


@cache
def published_curves(observation: str) -> tuple[PublishedCurve, ...]:
    """Return all curves for an observation type, `state` or `pixels`, in the order of methods.csv; empty for other types.

    Raises DataError if a file is missing or damaged.
    """
    return tuple(
        PublishedCurve(
            method=line["method"],
            observation=observation,
            task=task,
            measure=line["measure"],
            origin=f"{line['repository']}, {line['path']}, {line['commit'][:8]}",
            steps=steps,
            returns=returns,
        )
        for line in _rows("methods")
        if line["observation"] == observation
        for task, (steps, returns) in _tasks(line["file"]).items()
    )


def printed_points(observation: str) -> list[PrintedPoint]:
    """Return the reported means for an observation type, `state` or `pixels`."""
    return [
        PrintedPoint(
            method=row["method"],
            observation=row["observation"],
            task=row["task"],
            steps=int(row["steps"]),
            mean=float(row["mean"]),
            plus_minus=float(row["plus_minus"]),
            source=row["source"],
        )
        for row in _rows("printed")
        if row["observation"] == observation
    ]


def _tasks(stem: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the steps (k) and returns (seeds k) of each task."""
    rows = _rows(stem)
    try:
        names = [name for name in rows[0] if name not in ("task", "seed")]
        steps = np.array([int(name) for name in names])
        found: dict[str, list[list[float]]] = {}
        for row in rows:
            found.setdefault(row["task"], []).append([float(row[name] or "nan") for name in names])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{FOLDER}/{stem}.csv: damaged ({error!r}). Fix: reinstall difftori") from error
    if (np.diff(steps) <= 0).any():
        raise DataError(f"{FOLDER}/{stem}.csv: its steps do not increase. Fix: reinstall difftori")
    return {task: (steps, np.array(returns)) for task, returns in found.items()}


def _rows(stem: str) -> list[dict[str, str]]:
    try:
        text = files("difftori.paper").joinpath(f"{FOLDER}/{stem}.csv").read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{FOLDER}/{stem}.csv: cannot be read ({error}). Fix: reinstall difftori") from error
    return list(csv.DictReader(text.splitlines()))
