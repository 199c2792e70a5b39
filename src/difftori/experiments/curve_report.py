"""What the studies of reinforcement learning write and show: files for machines, a page for people, the screen."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from difftori.experiments.curve_tables import (
    OURS,
    Aggregate,
    Difference,
    Summary,
    aggregates,
    points,
    seed_results,
    summarise,
)
from difftori.experiments.curves import Curves
from difftori.experiments.reporting import Column, interval, markdown_table, number, screen_table, write_csv
from difftori.experiments.runs import num_seeds, num_steps, observation
from difftori.experiments.statistics import Estimate

_LEFT = ("task", "method", "measure")


def write_curves(curves: Curves, out: Path) -> tuple[list[Summary], list[Aggregate]]:
    """Writes `seeds.csv`, `curves.csv`, `summary.csv` and, if anything is finished, `aggregate.csv`; the last two's rows."""
    write_csv(out / "seeds.csv", seed_results(curves))
    write_csv(out / "curves.csv", points(curves))
    summaries, rows = summarise(curves), aggregates(curves)
    for name, lines in (("summary.csv", summaries), ("aggregate.csv", rows)):
        if lines:
            write_csv(out / name, lines)
        else:
            (out / name).unlink(missing_ok=True)  # that of an earlier, other part of the study
    return summaries, rows


def write_page(out: Path, title: str, parts: Sequence[str]) -> None:
    """Writes `summary.md`: the title and the parts that are not empty."""
    (out / "summary.md").write_text("\n\n".join([f"# {title}", *filter(None, parts)]) + "\n", encoding="utf-8")


def preface(curves: Curves) -> str:
    """What was run, how much of it, and by which command."""
    config = curves.config
    label = (
        f"**PARTIAL STUDY: {', '.join(curves.reasons)}.** Not comparable with the paper's figure."
        if curves.reasons
        else "Full study."
    )
    hardware = sorted({record.hardware for record in curves.records})
    software = sorted({_software(record.versions) for record in curves.records})
    return (
        f"{label} Observation: {observation(config)}; preset: {config.preset}; {num_steps(config)} environment steps a run; "
        f"up to {num_seeds(config)} seed(s) a task and method; evaluation without exploration, on seeds apart from training, "
        f"of the last weights. Drawn by `{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`. "
        f"Hardware: {'; '.join(hardware)}. Software: {'; '.join(software)}. The command of each run is in `seeds.csv`."
    )


def _software(versions: dict[str, str | None]) -> str:
    commit = versions["git_commit"]
    source = f"difftori {versions['difftori']}" if commit is None else f"difftori at {commit[:10]}"
    return f"{source}, torch {versions['torch']}"


def summary_table(summaries: Sequence[Summary], *, methods: Sequence[str]) -> str:
    """One line per task and number of steps, one column per method: mean ± half the 95 % interval (seeds)."""
    if not summaries:
        return "No method has come to a first evaluation after the start on any task together with the others."
    published = list(dict.fromkeys(_heading(row) for row in summaries if row.origin != OURS))
    lines = list(dict.fromkeys((row.task, row.steps) for row in summaries))
    columns = [
        Column("task", tuple(task for task, _ in lines), left=True),
        Column("steps", tuple(f"{steps:,}" for _, steps in lines)),
    ]
    for heading in [*methods, *published]:
        cells = {(row.task, row.steps): _cell(row) for row in summaries if _heading(row) == heading}
        columns.append(Column(heading, tuple(cells.get(line, "–") for line in lines)))
    return markdown_table(columns)


def aggregate_table(rows: Sequence[Aggregate]) -> str:
    """Ours and published ones at the last number of steps that ours have, or the last that a published one has before."""
    if not rows:
        return ""
    end = max(row.steps for row in rows if row.origin == OURS)
    last = {row.method + row.origin: row for row in rows if row.steps <= end}.values()
    texts = {
        "method": [row.method if row.origin == OURS else f"{row.method}, published" for row in last],
        "steps": [f"{row.steps:,}" for row in last],
        "tasks": [str(row.tasks) for row in last],
        "runs": [str(row.runs) for row in last],
        "normalised mean [95 %]": [_interval(row.mean, row.mean_low, row.mean_high) for row in last],
        "interquartile mean [95 %]": [_interval(row.iqm, row.iqm_low, row.iqm_high) for row in last],
    }
    return markdown_table(_columns(texts))


def difference_table(rows: Sequence[Difference]) -> str:
    """Paired differences in returns with their intervals."""
    if not rows:
        return "No pair of runs has come to the end yet."
    texts = {
        "task": [row.task for row in rows],
        "method": [f"{row.method} − {row.reference}" for row in rows],
        "measure": [row.measure for row in rows],
        "difference [95 %]": [_interval(row.value, row.low, row.high, 1, signed=True) for row in rows],
        "pairs": [str(row.pairs) for row in rows],
    }
    return markdown_table(_columns(texts))


def show(console: Console, curves: Curves, summaries: Sequence[Summary], title: str, out: Path) -> None:
    """Ours on the screen, and where the rest is."""
    rows = [row for row in summaries if row.origin == OURS]
    if rows:
        texts = {
            "task": [row.task for row in rows],
            "method": [row.method for row in rows],
            "steps": [f"{row.steps:,}" for row in rows],
            "return": [_cell(row) for row in rows],
        }
        console.print(screen_table(f"{title}, {curves.label}", _columns(texts)))
    console.print(f"Tables and pictures are in {out}.", soft_wrap=True)


OURS_NOTES = """\
± is half of Student's 95 % interval over seeds, whose number is in brackets; a single seed has none. A line compares
methods after the same number of environment steps."""

NOTES = f"""\
{OURS_NOTES} A published curve without a point there has a line of its
own. Published returns are the authors', with their networks, action repeats and numbers of seeds (origin in `summary.csv`).
Printed means have their paper's own ±, which is left out here."""

AGGREGATE_NOTES = """\
Normalised: return / 1000 (probes: the return). Only tasks and seeds count that every method of these runs has finished;
published methods are there if they have all of these tasks. Intervals: stratified bootstrap, tasks kept, seeds drawn."""


def _heading(row: Summary) -> str:
    if row.origin == OURS:
        return row.method
    kind = "printed" if row.seeds is None else "published"
    return f"{row.method}, {kind}"


def _cell(row: Summary) -> str:
    digits = 0 if row.observation != "probe" else 3
    reach = "" if row.low is None else f" ± {number(row.mean - row.low, digits)}"
    return f"{number(row.mean, digits)}{reach}" + ("" if row.seeds is None else f" ({row.seeds})")


def _interval(value: float, low: float | None, high: float | None, digits: int = 3, *, signed: bool = False) -> str:
    if low is None or high is None:
        return f"{value:{'+' if signed else ''}.{digits}f}"
    return interval(Estimate(value, low, high), digits, signed=signed)


def _columns(texts: dict[str, list[str]]) -> list[Column]:
    return [Column(heading, tuple(cells), heading in _LEFT) for heading, cells in texts.items()]
