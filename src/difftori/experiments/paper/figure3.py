"""Figure 3: learning curves of DiffTORI, TD-MPC, SAC and DrQ-v2 on the paper's 15 tasks, next to published ones.

All agents are compared on every task, with the same seeds and the same number of environment steps. The normalised mean and
interquartile mean over tasks have 95 % stratified bootstrap intervals (Agarwal et al., 2021, arXiv 2108.13264). DiffTORI has the
library's default settings; docs/reinforcement-studies.md lists the differences from the paper.

The defaults are the full study: 300 runs of a million steps from pixels. `--budget MINUTES`, `--methods`, `--tasks`,
`--seeds`, `--steps`, `--obs state` and `--preset compact` run a part of it, which is labelled `partial` in every output.
Re-run the same command to resume.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from difftori.experiments.plots import save_svg
from difftori.experiments.rl_plots import over_tasks, return_panels
from difftori.experiments.rl_report import AGGREGATE_NOTES, NOTES, aggregate_table, run_curves, summary_table
from difftori.experiments.rl_study import Curves, RLStudy, observation
from difftori.experiments.rl_tables import Aggregate, Summary
from difftori.experiments.study import Method
from difftori.paper.curves import published_curves

Name = Literal["difftori", "tdmpc", "sac", "drqv2"]
NAMES: tuple[Name, ...] = get_args(Name)
# DrQ-v2's authors use one-step returns on the tasks of walker.
_TASK_SETTINGS = {"drqv2": {f"walker-{task}": {"horizon": 1} for task in ("run", "stand", "walk")}}
METHODS: dict[Name, Method] = {n: Method(n, n, task_settings=_TASK_SETTINGS.get(n, {})) for n in NAMES}


class Config(RLStudy):
    """Learning curves of DiffTORI, TD-MPC, SAC and DrQ-v2, next to published ones (Figure 3)."""

    methods: tuple[Name, ...] = Field(default=NAMES, min_length=1)
    """Agents that are compared (default: all four)."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/figure3`. Raises RunsFailedError at the end if runs failed."""
    methods = [METHODS[name] for name in dict.fromkeys(config.methods)]
    lacking = [name for name in NAMES if name not in config.methods]
    run_curves(
        config,
        methods,
        draw,
        study="figure3",
        title="Figure 3: agents on DeepMind Control",
        further=[f"without {', '.join(lacking)}"] if lacking else [],
    )


def draw(curves: Curves, out: Path, summaries: Sequence[Summary], rows: Sequence[Aggregate]) -> list[str]:
    """Write the figures, and return the parts of the page."""
    published = published_curves(observation(curves.options))
    save_svg(return_panels(curves, published=published), out / "tasks.svg")
    save_svg(over_tasks(curves, rows), out / "all_tasks.svg")
    table = summary_table(summaries, methods=curves.methods)
    return [table, NOTES, *([aggregate_table(rows), AGGREGATE_NOTES] if rows else [])]
