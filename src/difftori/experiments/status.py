"""The states of a sweep's runs, read from their folders. Works from any machine that can read them."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from difftori.errors import DifftoriError
from difftori.experiments.plan import FAILED, RunSpec, beside
from difftori.runs.records import read_metrics, read_summary

State = Literal["finished", "running", "failed", "interrupted", "waiting"]
HEADLINES = (
    "return",
    *(f"{which}/{name}" for name in ("success", "excess_cost", "action_error") for which in ("last", "best")),
    "last/validation_error",
)
"""The result shown for a finished run is the first of these that its summary has."""

_MANY = 60
_URGENT = ("failed", "interrupted", "running")


@dataclass(frozen=True)
class RunStatus:
    """The state of one run, its progress, and a note."""

    run: RunSpec
    state: State
    step: int | None
    note: str

    def row(self) -> dict[str, Any]:
        """Return the row of this run in the table."""
        return {"run": self.run.name, "state": self.state, "step": self._progress(), "": self.note}

    def _progress(self) -> str:
        if self.step is None:
            return ""
        return str(self.step) if self.run.length is None else f"{self.step} of {self.run.length}"


def run_status(run: RunSpec) -> RunStatus:
    """Return the state of a run. `interrupted`: it was started, and no process works on it; re-running the sweep resumes it."""
    if run.finished:
        return RunStatus(run, "finished", _step(run), _headline(run))
    failed = beside(run.folder, FAILED)
    if run.locked:
        return RunStatus(run, "running", _step(run), _age(run))
    if failed.exists():
        return RunStatus(run, "failed", _step(run), _reason(failed.read_bytes()))
    if (run.folder / "config.yaml").exists():
        return RunStatus(run, "interrupted", _step(run), _age(run))
    return RunStatus(run, "waiting", None, "" if run.base is None else f"refines {run.base.name}")


def table(found: Sequence[RunStatus]) -> list[dict[str, Any]]:
    """Return a row for each run. For more than 60 runs, return a row for each method, over tasks and seeds, and rows for the first
    60 failed, interrupted and running runs, in this order.
    """
    if len(found) <= _MANY:
        return [s.row() for s in found]
    methods: dict[str, list[RunStatus]] = {}
    for s in found:
        methods.setdefault(s.run.folder.parent.name, []).append(s)
    lines: list[dict[str, Any]] = [
        {"run": f"*/{name}/*", "state": "", "step": "", "": counts(own)} for name, own in methods.items()
    ]
    urgent = sorted((s for s in found if s.state in _URGENT), key=lambda s: _URGENT.index(s.state))
    lines += [s.row() for s in urgent[:_MANY]]
    if len(urgent) > _MANY:
        lines.append({"run": f"… and {len(urgent) - _MANY} more", "state": "", "step": "", "": counts(urgent[_MANY:])})
    return lines


def counts(found: Sequence[RunStatus]) -> str:
    """Return the number of runs in each state, as text."""
    states = ("finished", "running", "failed", "interrupted", "waiting")
    numbers = {state: sum(s.state == state for s in found) for state in states}
    return ", ".join(f"{number} {state}" for state, number in numbers.items() if number) or "no runs"


def _step(run: RunSpec) -> int | None:
    try:
        rows = read_metrics(run.folder)
    except DifftoriError:
        return None
    return rows[-1]["step"] if rows else None


def _age(run: RunSpec) -> str:
    rows = run.folder / "metrics.jsonl"
    if not rows.exists():
        return "no row yet"
    seconds = max(0.0, time.time() - rows.stat().st_mtime)
    shown = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )
    return f"last row {shown} ago"


def _headline(run: RunSpec) -> str:
    try:
        summary = read_summary(run.folder)
    except DifftoriError as error:
        return str(error)
    name = next((name for name in HEADLINES if name in summary), None)
    return "" if name is None else f"{name} {summary[name]:.4g}"


def _reason(note: bytes) -> str:
    try:
        plain = json.loads(note)
        return f"status {plain['status']} on {plain['host']}: {plain['reason']}"
    except (ValueError, KeyError, TypeError):
        return "the error file cannot be read; see the log next to the folder"
