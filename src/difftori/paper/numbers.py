"""Reads the numbers printed in the paper (arXiv 2402.05421) from the CSV files in this folder."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from difftori.errors import ConfigError

RESULTS = {
    "table1_metaworld_success_percent": "level",
    "table2_and_4_robomimic_pusht_failure_rate": "",
    "table3_and_5_maniskill_success_rate": "",
    "table6_robomimic_position_control_failure_rate": "dataset",
    "table7_horizon_failure_rate": "horizon",
    "table8_pendulum_cost": "",
}
"""The result tables by file name, and the column that `PaperNumber.variant` holds."""


@dataclass(frozen=True)
class PaperNumber:
    """A printed result: `mean` ± `std` of `method` on `task`. The name of the table contains the unit.

    `variant` is the additional column of the table (level, data set or horizon), or "" if it has none. `std` is None if the
    paper prints none. Table 7 has one method, DiffTORI. In Table 8, `task` is the setting.
    """

    task: str
    method: str
    variant: str
    mean: float
    std: float | None


@dataclass(frozen=True)
class PaperTask:
    """One of the 15 DeepMind Control tasks with the paper's action repeat and Levenberg–Marquardt settings."""

    task: str
    action_repeat: int
    lm_iterations: int
    lm_step_size: float
    lm_damping: float


@dataclass(frozen=True)
class PaperSetting:
    """A row of Table 9: `part` is `rl` or `il`, `value` is as printed."""

    part: str
    name: str
    value: str


@dataclass(frozen=True)
class PaperTiming:
    """The time for one action with `planner` on `hardware`, in seconds."""

    planner: str
    seconds: float
    hardware: str


def paper_numbers(table: str) -> list[PaperNumber]:
    """Return the rows of a result table in print order. Raises `ConfigError` if `table` is not a key of `RESULTS`."""
    if table not in RESULTS:
        raise ConfigError([f"paper table {table!r} is unknown. Fix: choose one of {', '.join(RESULTS)}"])
    variant = RESULTS[table]
    return [
        PaperNumber(
            task=row["setting"] if "setting" in row else row["task"],
            method=row.get("method", "difftori"),
            variant=row[variant] if variant else "",
            mean=float(row["mean"]),
            std=float(row["std"]) if row["std"] else None,
        )
        for row in _rows(table)
    ]


def labelled_numbers(table: str, labels: Mapping[str, str]) -> list[tuple[PaperNumber, str]]:
    """Return the rows of a result table whose method is a value of `labels`, in print order, each with the key of its method."""
    return [(row, label) for row in paper_numbers(table) for label, method in labels.items() if row.method == method]


def paper_tasks() -> list[PaperTask]:
    """Return the 15 DeepMind Control tasks."""
    return [
        PaperTask(
            task=row["task"],
            action_repeat=int(row["action_repeat"]),
            lm_iterations=int(row["lm_iterations"]),
            lm_step_size=float(row["lm_step_size"]),
            lm_damping=float(row["lm_damping"]),
        )
        for row in _rows("dmc15_tasks")
    ]


def paper_settings() -> list[PaperSetting]:
    """Return Table 9, the hyperparameters."""
    return [PaperSetting(row["part"], row["name"], row["value"]) for row in _rows("table9_hyperparameters")]


def paper_timings() -> list[PaperTiming]:
    """Return the times per action."""
    rows = _rows("timing_seconds_per_action")
    return [PaperTiming(row["planner"], float(row["seconds"]), row["hardware"]) for row in rows]


def _rows(stem: str) -> list[dict[str, str]]:
    text = files("difftori.paper").joinpath(f"{stem}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
