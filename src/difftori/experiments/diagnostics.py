"""Diagnostics of the policy-gradient term in each run: its critic, its planner, its gradient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from difftori.experiments.rl_study import Curves
from difftori.experiments.study import Result
from difftori.experiments.tables import columns, markdown_table, number

_RATIOS, _COSINES = (
    tuple(f"diagnosis/{measure}/{network}" for network in ("encoder", "dynamics", "reward", "q"))
    for measure in ("ratio", "cosine")
)
"""Names of the metrics that compare the gradients of the term and of Eq. 3, one for each network."""

NOTES = """\
Medians over the evaluations of the second half of all runs, before clipping. `Q̃ / return`: the critic's value of the observations and
actions of an evaluation, divided by the discounted return that followed (after the time limit: as in the episode's second half).
`correlation`: between the two, within an evaluation. `gain`: Q̃(s, planner) − Q̃(s, prior). `free`: share of the first actions'
coordinates inside the box. `strict`: share of plans near a strict optimum. `PG / Eq. 3` and `cosine`: norm ratio and cosine of the
term's gradient and that of Eq. 3 on the same batch, median over the four networks."""


@dataclass(frozen=True)
class Diagnostic:
    """One row of `diagnostics.csv`: medians over the evaluations of the second half of the runs of one task and method."""

    task: str
    method: str
    runs: int
    value_over_return: float | None
    correlation: float
    gain: float
    free: float
    strict: float
    norm_ratio: float
    cosine: float
    label: str


def diagnostics(curves: Curves) -> list[Diagnostic]:
    """Return one row per task and method, from the runs that logged diagnostics."""
    found = []
    for task in curves.tasks:
        for method in curves.methods:
            results = curves.of(task, method.label).values()
            rows = [row for result in results for row in _late(result) if "diagnosis/gain" in row]
            if rows:
                found.append(_median(rows, task=task, method=method.label, runs=len(results), label=curves.label))
    return found


def diagnostics_table(rows: Sequence[Diagnostic]) -> str:
    """Format the diagnostics as a Markdown table."""
    if not rows:
        return "No run has logged diagnostics yet."
    cells = {
        "task": [row.task for row in rows],
        "method": [row.method for row in rows],
        "Q̃ / return": ["–" if (v := row.value_over_return) is None else number(v, 2) for row in rows],
        "correlation": [number(row.correlation, 2) for row in rows],
        "gain": [f"{row.gain:+.3f}" for row in rows],
        "free": [number(row.free, 2) for row in rows],
        "strict": [number(row.strict, 2) for row in rows],
        "PG / Eq. 3": [number(row.norm_ratio, 1) for row in rows],
        "cosine": [f"{row.cosine:+.2f}" for row in rows],
    }
    return markdown_table(columns(cells))


def logged(rows: Sequence[Mapping[str, Any]], *names: str) -> list[float]:
    """Return the values of these metrics in all rows that have them; NaN is stored as None and left out."""
    return [row[name] for name in names for row in rows if row.get(name) is not None]


def _late(result: Result) -> list[dict]:
    return [row for row in result.record.returns if row["step"] > result.run.config.steps / 2]


def _median(rows: list[dict], *, task: str, method: str, runs: int, label: str) -> Diagnostic:
    def of(*names: str) -> list[float]:
        return logged(rows, *names)

    calibration = [(row["eval/obs_q"], row["eval/discounted_return"]) for row in rows if "eval/obs_q" in row]
    over = [value / followed for value, followed in calibration if followed]
    return Diagnostic(
        task=task,
        method=method,
        runs=runs,
        value_over_return=float(np.median(over)) if over else None,
        correlation=float(np.median(of("eval/obs_q_correlation"))),
        gain=float(np.median(of("diagnosis/gain"))),
        free=float(np.median(of("diagnosis/free"))),
        strict=float(np.median(of("diagnosis/valid"))),
        norm_ratio=float(np.median(of(*_RATIOS))),
        cosine=float(np.median(of(*_COSINES))),
        label=label,
    )
