"""Figure 3: learning curves of DiffTORI and TD-MPC on the paper's 15 tasks, next to published ones.

Both agents are compared on every task, with the same seeds and the same number of environment steps. The normalised mean and
interquartile mean over tasks have 95 % stratified bootstrap intervals (Agarwal et al., 2021, arXiv 2108.13264). DiffTORI has the
library's default settings; docs/reinforcement-studies.md lists the differences from the paper.

The defaults are the full study: 150 runs of a million steps from pixels. `--budget MINUTES`, `--tasks`, `--seeds`, `--steps`, `--obs state` and
`--preset compact` run a part of it, which is labelled `partial` in every output. Re-run the same command to resume.
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
    """Learning curves of DiffTORI and TD-MPC, next to published ones (Figure 3)."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/figure3`. Raises RunsFailedError at the end if runs failed."""
    run_curves(config, METHODS, draw, study="figure3", title="Figure 3: DiffTORI and TD-MPC on DeepMind Control")


def draw(curves: Curves, out: Path, summaries: Sequence[Summary], rows: Sequence[Aggregate]) -> list[str]:
    """Write the figures, and return the parts of the page."""
    published = published_curves(observation(curves.options))
    save_svg(return_panels(curves, published=published), out / "tasks.svg")
    save_svg(over_tasks(curves, rows), out / "all_tasks.svg")
    table = summary_table(summaries, methods=curves.methods)
    return [table, NOTES, *([aggregate_table(rows), AGGREGATE_NOTES] if rows else [])]
