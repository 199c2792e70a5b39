"""Output of the reinforcement learning studies: tables, figures and a page."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from difftori.experiments.diagnostics import NOTES as DIAGNOSTICS_NOTES
from difftori.experiments.diagnostics import diagnostics, diagnostics_table
from difftori.experiments.plots import save_svg
from difftori.experiments.pool import report_failures
from difftori.experiments.rl_plots import final_differences, return_panels
from difftori.experiments.rl_study import Curves, RLStudy, budget_name, make_curves, num_seeds, num_steps, observation
from difftori.experiments.rl_tables import (
    OURS,
    Aggregate,
    Summary,
    aggregates,
    differences,
    points,
    seed_results,
    summarise,
)
from difftori.experiments.study import Method
from difftori.experiments.tables import (
    Column,
    columns,
    difference_table,
    interval,
    markdown_table,
    number,
    screen_table,
    write_csv,
    write_page,
)

Draw = Callable[[Curves, Path, Sequence[Summary], Sequence[Aggregate]], list[str]]
"""A function that writes a study's own tables and figures into a directory, and returns the parts of its page."""
Tables = Callable[[Curves], Mapping[str, Sequence[Column]]]
"""A function that returns the tables to print, by title."""
PAPER = "Not comparable with the paper's figure."


def run_curves(
    config: RLStudy,
    methods: Sequence[Method],
    draw: Draw,
    *,
    study: str,
    title: str,
    further: Sequence[str] = (),
    tables: Tables | None = None,
    warning: str = PAPER,
) -> None:
    """Run the missing runs, and write `out/<study>`: the tables of all learning curves, the output of `draw`, and the page.

    `further` are reasons that make the study partial, `warning` is the page's sentence if it is. `tables` are printed (default: the
    returns by task and method). Raises RunsFailedError at the end if runs failed.
    """
    console = Console()
    say = partial(console.print, highlight=False, soft_wrap=True)
    curves = make_curves(config, methods, further=further, say=say)
    out = curves.folder(study, budget_name(config))
    summaries, rows = summarise(curves), aggregates(curves)
    write_csv(out / "seeds.csv", seed_results(curves))
    write_csv(out / "curves.csv", points(curves))
    write_csv(out / "summary.csv", summaries)
    write_csv(out / "aggregate.csv", rows)
    write_page(out, title, [preface(curves, warning), *draw(curves, out, summaries, rows)])
    shown = {"": _returns(summaries)} if tables is None else tables(curves)
    for name, table in shown.items():
        if table and table[0].cells:
            console.print(screen_table(f"{', '.join(filter(None, (title, name)))}, {curves.label}", table))
    console.print(f"Tables and figures are in {out}.", soft_wrap=True)
    report_failures(curves.failures)


def run_ablation(
    config: RLStudy, methods: Sequence[Method], *, study: str, title: str, further: Sequence[str] = ()
) -> None:
    """Run a study that compares methods with the first of them: learning curves, and paired differences."""

    def draw(curves: Curves, out: Path, summaries: Sequence[Summary], rows: Sequence[Aggregate]) -> list[str]:
        changes, diagnosed = differences(curves, methods[0].label), diagnostics(curves)
        write_csv(out / "differences.csv", changes)
        write_csv(out / "diagnostics.csv", diagnosed)
        save_svg(return_panels(curves, published=()), out / "tasks.svg")
        save_svg(final_differences(curves, changes), out / "differences.svg")
        table = summary_table([row for row in summaries if row.origin == OURS], methods=methods)
        explained = [diagnostics_table(diagnosed), DIAGNOSTICS_NOTES] if diagnosed else []
        shown = markdown_table(difference_table(changes, digits=1)) if changes else "No pair of runs is finished yet."
        return [shown, PAIRED_NOTES, table, OURS_NOTES, *explained]

    run_curves(config, methods, draw, study=study, title=title, further=further)


def preface(curves: Curves, warning: str = PAPER) -> str:
    """Return the first paragraph of the page: protocol, completeness, hardware, software and command."""
    config = curves.options
    label = f"**PARTIAL STUDY: {', '.join(curves.reasons)}.** {warning}" if curves.reasons else "Full study."
    hardware = sorted({result.record.hardware for result in curves.runs})
    software = sorted({_software(result.record.versions) for result in curves.runs})
    return (
        f"{label} Observation: {observation(config)}; preset: {config.preset}; {num_steps(config)} environment steps per run; "
        f"up to {num_seeds(config)} seed(s) per task and method; evaluation of the last weights without exploration, on seeds "
        f"that training does not use. Created by `{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`. "
        f"Hardware: {'; '.join(hardware)}. Software: {'; '.join(software)}. The command of each run is in `seeds.csv`."
    )


def _software(versions: Mapping[str, str | None]) -> str:
    commit = versions["git_commit"]
    source = f"difftori {versions['difftori']}" if commit is None else f"difftori at {commit[:10]}"
    return f"{source}, torch {versions['torch']}"


def summary_table(summaries: Sequence[Summary], *, methods: Sequence[Method]) -> str:
    """Format one row per task and number of steps, and one column per method: mean ± half the 95 % interval (seeds)."""
    if not summaries:
        return "There is no task on which all methods have reached their first evaluation after the start."
    published = list(dict.fromkeys(_heading(row) for row in summaries if row.origin != OURS))
    lines = list(dict.fromkeys((row.task, row.steps) for row in summaries))
    texts = {"task": [task for task, _ in lines], "steps": [f"{steps:,}" for _, steps in lines]}
    for heading in [*(method.label for method in methods), *published]:
        cells = {(row.task, row.steps): _cell(row) for row in summaries if _heading(row) == heading}
        texts[heading] = [cells.get(line, "–") for line in lines]
    return markdown_table(columns(texts))


def aggregate_table(rows: Sequence[Aggregate]) -> str:
    """Format our results at our last number of steps, and published ones at the same number, or their last one before it."""
    if not rows:
        return ""
    end = max(row.steps for row in rows if row.origin == OURS)
    last = {row.method + row.origin: row for row in rows if row.steps <= end}.values()
    texts = {
        "method": [row.method if row.origin == OURS else f"{row.method}, published" for row in last],
        "steps": [f"{row.steps:,}" for row in last],
        "tasks": [str(row.tasks) for row in last],
        "runs": [str(row.runs) for row in last],
        "normalised mean [95 %]": [interval(row.mean) for row in last],
        "interquartile mean [95 %]": [interval(row.iqm) for row in last],
    }
    return markdown_table(columns(texts))


def _returns(summaries: Sequence[Summary]) -> list[Column]:
    """Return the columns of our results: the return by task and method."""
    rows = [row for row in summaries if row.origin == OURS]
    return columns(
        {
            "task": [row.task for row in rows],
            "method": [row.method for row in rows],
            "steps": [f"{row.steps:,}" for row in rows],
            "return": [_cell(row) for row in rows],
        }
    )


PAIRED_NOTES = """\
Differences are paired by task and seed, over pairs of finished runs: `final` of the last evaluation, `area` of the mean of all
evaluations. The interval of a task is Student's over seeds; that of all tasks is a stratified bootstrap of the mean of task means. A
seed determines the initial weights and the starts of training and evaluation episodes; afterwards, the runs of a pair diverge."""

OURS_NOTES = """\
± is half of Student's 95 % interval over seeds, with the number of seeds in brackets; a single seed has no interval. A row compares
methods after the same number of environment steps."""

NOTES = f"""\
{OURS_NOTES} A published curve without a point at that number has
its own row. Published returns are the authors', with their networks, action repeats and numbers of seeds (origin in `summary.csv`).
Printed means have a ± in their papers, which is omitted here."""

AGGREGATE_NOTES = """\
Normalised: return / 1000 (probes: the return). The rows use the tasks and seeds that every method of these runs has finished, and
the published methods that have all of these tasks. Intervals: stratified bootstrap over seeds within tasks."""


def _heading(row: Summary) -> str:
    if row.origin == OURS:
        return row.method
    kind = "printed" if row.seeds is None else "published"
    return f"{row.method}, {kind}"


def _cell(row: Summary) -> str:
    digits = 0 if row.observation != "probe" else 3
    reach = f" ± {number(row.mean.value - row.mean.low, digits)}" if row.mean.bounded else ""
    return f"{number(row.mean.value, digits)}{reach}" + ("" if row.seeds is None else f" ({row.seeds})")
