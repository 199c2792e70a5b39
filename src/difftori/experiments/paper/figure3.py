"""Figure 3: learning curves of DiffTORI and TD-MPC on the paper's 15 tasks, beside published ones.

Every task with both agents from the same seeds at the same number of environment steps; then the normalised mean and
interquartile mean over tasks with 95 % stratified bootstrap intervals (Agarwal et al., 2021, arXiv 2108.13264). DiffTORI
is the library's default form: docs/reinforcement-studies.md says how it differs from the paper's.

The defaults are the full study: 150 runs of a million steps from pixels. `--budget MINUTES`, `--tasks`, `--seeds`, `--steps`, `--obs state` and
`--preset compact` run a part of it, which is labelled `partial` in every output; the same command goes on where it was.
"""

from rich.console import Console

from difftori.experiments.curve_plots import over_tasks, task_panels
from difftori.experiments.curve_report import (
    AGGREGATE_NOTES,
    NOTES,
    aggregate_table,
    preface,
    show,
    summary_table,
    write_curves,
    write_page,
)
from difftori.experiments.curves import make_curves, output_folder
from difftori.experiments.plots import save_svg
from difftori.experiments.pool import report_failures
from difftori.experiments.runs import Arm, StudyConfig

ARMS = (Arm("difftori", "difftori"), Arm("tdmpc", "tdmpc"))
TITLE = "Figure 3: DiffTORI and TD-MPC on DeepMind Control"


class Config(StudyConfig):
    """What to run of Figure 3."""


def run(config: Config) -> None:
    """Run what is missing, and write `out/figure3`. RunsFailedError, after everything is drawn, if runs failed."""
    console = Console()
    curves = make_curves(config, ARMS, say=lambda text: console.print(text, highlight=False, soft_wrap=True))
    out = output_folder(curves, "figure3")
    summaries, rows = write_curves(curves, out)
    save_svg(task_panels(curves, title="evaluation returns", beside=True), out / "tasks.svg")
    (out / "all_tasks.svg").unlink(missing_ok=True)
    if rows:
        save_svg(over_tasks(curves, rows), out / "all_tasks.svg")
    table = summary_table(summaries, methods=[arm.label for arm in ARMS])
    over = [aggregate_table(rows), AGGREGATE_NOTES] if rows else []
    write_page(out, TITLE, [preface(curves), table, NOTES, *over])
    show(console, curves, summaries, TITLE, out)
    report_failures(curves.failures)
