"""Figure 7: the runs of Figure 3 over wall-clock time, and the time of an agent step and an update of DiffTORI, compared with TD-MPC.

Seconds are training time without evaluation, of runs without `--compile`, whose seconds would include compilation. Ratios are
between runs on the same task, seed and hardware. They are comparable with `--jobs 1` and no other load; otherwise the load
differs between runs. `difftori bench rl` measures both agents under equal conditions. The paper reports 0.052 s per action,
compared with 0.0092 s for TD-MPC.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difftori.experiments.paper.figure3 import METHODS
from difftori.experiments.plots import save_svg
from difftori.experiments.rl_plots import return_panels
from difftori.experiments.rl_report import run_curves
from difftori.experiments.rl_study import Curves, RLStudy
from difftori.experiments.rl_tables import Aggregate, Summary
from difftori.experiments.study import Result
from difftori.experiments.tables import Column, markdown_table, number, write_csv
from difftori.paper.numbers import paper_timings

_PAIR = (METHODS["difftori"], METHODS["tdmpc"])


class Config(RLStudy):
    """Returns over wall-clock time, and the time of actions and updates (Figure 7). The runs are those of Figure 3."""


@dataclass(frozen=True)
class Timing:
    """One row of `timing.csv`: a pair of finished runs of one task and seed. Times in milliseconds, ratios DiffTORI / TD-MPC.

    `action` is the time of inference per agent step, after the random ones at the start. `update` is the time of sampling a
    batch and learning, per update. `step` is the time of the whole training without evaluation, per environment step.
    """

    task: str
    seed: int
    hardware: str
    same_hardware: bool
    difftori_action: float
    tdmpc_action: float
    action_ratio: float
    difftori_update: float
    tdmpc_update: float
    update_ratio: float
    difftori_step: float
    tdmpc_step: float
    step_ratio: float
    label: str


def run(config: Config) -> None:
    """Run the missing runs, and write `out/figure7`. Raises RunsFailedError at the end if runs failed."""
    run_curves(
        config,
        _PAIR,
        draw,
        study="figure7",
        title="Figure 7: return against wall-clock time",
    )


def draw(curves: Curves, out: Path, summaries: Sequence[Summary], aggregates: Sequence[Aggregate]) -> list[str]:
    """Write the figure and the table of times, and return the parts of the page."""
    save_svg(return_panels(curves, published=(), clock=True), out / "wall_clock.svg")
    rows = timings(curves)
    write_csv(out / "timing.csv", rows)
    return [_table(rows), _notes()]


def timings(curves: Curves) -> list[Timing]:
    """Return one row for each task and seed that both agents have finished."""
    rows = []
    for task in curves.tasks:
        ours_by_seed, theirs_by_seed = (curves.of(task, method.label) for method in _PAIR)
        for seed, result in ours_by_seed.items():
            other = theirs_by_seed.get(seed)
            ours, theirs = _costs(result), None if other is None else _costs(other)
            if ours is None or theirs is None or other is None:
                continue
            action, update, step = (a / b for a, b in zip(ours, theirs, strict=True))
            rows.append(
                Timing(
                    task=task,
                    seed=seed,
                    hardware=result.record.hardware,
                    same_hardware=result.record.hardware == other.record.hardware,
                    difftori_action=ours[0],
                    tdmpc_action=theirs[0],
                    action_ratio=action,
                    difftori_update=ours[1],
                    tdmpc_update=theirs[1],
                    update_ratio=update,
                    difftori_step=ours[2],
                    tdmpc_step=theirs[2],
                    step_ratio=step,
                    label=curves.label,
                )
            )
    return rows


def _costs(result: Result) -> tuple[float, float, float] | None:
    """Return the milliseconds of an action, an update and an environment step. None for an unfinished run, one with random actions
    only, or one whose seconds include compilation.
    """
    if not result.finished or result.record.config.get("compile"):
        return None
    summary = result.summary
    planned = summary["agent_steps"] - result.run.config.settings.seed_steps
    if planned <= 0 or summary["updates"] == 0:
        return None
    learning = summary["seconds/sampling"] + summary["seconds/update"]
    whole = summary["seconds"] - summary["seconds/evaluation"]
    costs = (summary["seconds/acting"] / planned, learning / summary["updates"], whole / summary["env_steps"])
    return costs[0] * 1e3, costs[1] * 1e3, costs[2] * 1e3


def _table(rows: list[Timing]) -> str:
    """Format the means over seeds by task, from pairs on the same hardware."""
    same = [row for row in rows if row.same_hardware]
    if not same:
        return "There is no task with a pair of finished runs on the same hardware."
    groups = {task: [row for row in same if row.task == task] for task in dict.fromkeys(row.task for row in same)}
    cells = [("task", list(groups))]
    for part in ("action", "update", "step"):
        for agent in ("difftori", "tdmpc"):
            means = [_mean(group, f"{agent}_{part}") for group in groups.values()]
            cells.append((f"{agent}, ms/{part}", [number(mean, 2) for mean in means]))
        ratios = [_mean(group, f"{part}_ratio") for group in groups.values()]
        cells.append(("ratio", [number(ratio, 2) for ratio in ratios]))
    cells.append(("pairs", [str(len(group)) for group in groups.values()]))
    return markdown_table([Column(heading, tuple(texts), heading == "task") for heading, texts in cells])


def _mean(group: list[Timing], name: str) -> float:
    return float(np.mean([getattr(row, name) for row in group]))


def _notes() -> str:
    printed = "; ".join(f"{row.planner}: {1e3 * row.seconds:g} ms on {row.hardware}" for row in paper_timings())
    return (
        "`action`: inference per agent step, after the random ones at the start; plans are initially shorter, as scheduled. "
        "`update`: sampling a batch and learning. `step`: the whole training without evaluation per environment step, including "
        "policy-gradient steps at the end of episodes. Means over pairs of runs on the same task, seed and hardware. Printed "
        f"in the paper, per action: {printed}."
    )
