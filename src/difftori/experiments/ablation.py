"""A study of arms of one agent: learning curves, and paired differences from one of them."""

from collections.abc import Sequence

from rich.console import Console

from difftori.experiments.curve_plots import difference_bars, task_panels
from difftori.experiments.curve_report import (
    OURS_NOTES,
    difference_table,
    preface,
    show,
    summary_table,
    write_curves,
    write_page,
)
from difftori.experiments.curve_tables import OURS, differences
from difftori.experiments.curves import make_curves, output_folder
from difftori.experiments.diagnostics import NOTES as DIAGNOSTICS_NOTES
from difftori.experiments.diagnostics import diagnostics, diagnostics_table
from difftori.experiments.plots import save_svg
from difftori.experiments.pool import report_failures
from difftori.experiments.reporting import write_csv
from difftori.experiments.runs import Arm, StudyConfig

_PAIRED = """\
Differences are paired by task and seed, over runs that have both come to the end: `final` of the last evaluation, `area` of
the mean of all evaluations. A task's interval is Student's over seeds, that of all tasks a stratified bootstrap of the mean of
task means. A seed fixes initial weights and the starts of episodes, evaluation's too; what runs do with them drifts apart."""


def run_ablation(
    config: StudyConfig, arms: Sequence[Arm], reference: Arm, *, study: str, title: str, further: Sequence[str]
) -> None:
    """Run what is missing, and write `out/<study>`. RunsFailedError, after everything is drawn, if runs failed."""
    console = Console()
    curves = make_curves(
        config, arms, further=further, say=lambda text: console.print(text, highlight=False, soft_wrap=True)
    )
    out = output_folder(curves, study)
    summaries, _ = write_curves(curves, out)
    save_svg(task_panels(curves, title="evaluation returns", beside=False), out / "tasks.svg")
    rows = differences(curves, reference)
    seen = diagnostics(curves)
    for name in ("differences.csv", "differences.svg", "diagnostics.csv"):
        (out / name).unlink(missing_ok=True)
    if rows:
        write_csv(out / "differences.csv", rows)
        save_svg(difference_bars(curves, rows, reference=reference.label), out / "differences.svg")
    if seen:
        write_csv(out / "diagnostics.csv", seen)
    ours = [row for row in summaries if row.origin == OURS]
    table = summary_table(ours, methods=[arm.label for arm in arms])
    explained = [diagnostics_table(seen), DIAGNOSTICS_NOTES] if seen else []
    write_page(out, title, [preface(curves), difference_table(rows), _PAIRED, table, OURS_NOTES, *explained])
    show(console, curves, summaries, title, out)
    report_failures(curves.failures)
