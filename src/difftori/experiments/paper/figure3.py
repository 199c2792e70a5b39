"""Figure 3: learning curves of DiffTORI and TD-MPC on the paper's 15 tasks, beside published ones.

Every task with both agents from the same seeds at the same number of environment steps; then the normalised mean and
interquartile mean over tasks with 95 % stratified bootstrap intervals (Agarwal et al., 2021, arXiv 2108.13264). DiffTORI
is the library's default form: docs/reinforcement-studies.md says how it differs from the paper's.

The defaults are the full study: 150 runs of a million steps from pixels. `--budget MINUTES`, `--tasks`, `--seeds`, `--steps`, `--obs state` and
`--preset compact` run a part of it, which is labelled `partial` in every output; re-run the same command to resume.
"""

from collections.abc import Sequence
from pathlib import Path

from difftori.experiments.plots import save_svg
from difftori.experiments.rl_plots import over_tasks, return_panels
from difftori.experiments.rl_report import AGGREGATE_NOTES, NOTES, aggregate_table, run_curves, summary_table
from difftori.experiments.rl_study import Curves, RLStudy, observation
from difftori.experiments.rl_tables import Aggregate, Summary
from difftori.experiments.study import Method
from difftori.paper.curves import published_curves

METHODS = (Method("difftori", "difftori"), Method("tdmpc", "tdmpc"))


class Config(RLStudy):
    """Learning curves of DiffTORI and TD-MPC (Figure 3), beside published ones."""


def run(config: Config) -> None:
    """Run what is missing, and write `out/figure3`. RunsFailedError, after everything is drawn, if runs failed."""
    run_curves(config, METHODS, draw, study="figure3", title="Figure 3: DiffTORI and TD-MPC on DeepMind Control")


def draw(curves: Curves, out: Path, summaries: Sequence[Summary], rows: Sequence[Aggregate]) -> list[str]:
    """The figures, and the tables of the page."""
    published = published_curves(observation(curves.options))
    save_svg(return_panels(curves, published=published), out / "tasks.svg")
    save_svg(over_tasks(curves, rows), out / "all_tasks.svg")
    table = summary_table(summaries, methods=curves.methods)
    return [table, NOTES, *([aggregate_table(rows), AGGREGATE_NOTES] if rows else [])]
