"""Output of the Table 8 study: one row per seed, and the summary next to the paper's numbers, as files and in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from difftori.experiments.statistics import Estimate, paired_difference, ratio_interval, spread
from difftori.experiments.tables import (
    Column,
    columns,
    interval,
    markdown_table,
    number,
    plus_minus,
    screen_table,
    write_csv,
    write_page,
)
from difftori.paper.numbers import PaperNumber, paper_numbers

PAPER_TABLE = "table8_pendulum_cost"
BOOTSTRAP_SEED = 0
PRINTED_AS = {"difftori-step": "difftori"}
"""The paper prints one row for DiffTORI, and does not specify which of the two variants it is."""


@dataclass(frozen=True)
class SeedResult:
    """One row of `seeds.csv`. Costs are summed over the horizon and averaged over starts. The fields are the columns of the file.

    `…_test` is the protocol of the seed's own 10 test trajectories, `…_common` that of the common starts. `difference` is cost −
    expert's cost on the same common starts, with its 95 % interval over starts. `control_mse_…` is the error against the expert's
    controls. `epochs`, `updates`, `seconds` (the wall-clock time of training), `threads`, `hardware` and `command` are None for
    the expert.
    """

    setting: str
    method: str
    seed: int
    label: str
    test_starts: int
    cost_test: float
    expert_test: float
    ratio_test: float
    control_mse_test: float
    common_starts: int
    cost_common: float
    expert_common: float
    ratio_common: float
    difference: Estimate
    control_mse_common: float
    epochs: int | None
    updates: int | None
    seconds: float | None
    threads: int | None
    hardware: str | None
    command: str | None


@dataclass(frozen=True)
class Evaluation:
    """A row of `seeds.csv` with the costs on each common start (B), which the summary pairs."""

    result: SeedResult
    costs: np.ndarray
    expert_costs: np.ndarray


@dataclass(frozen=True)
class Summary:
    """One row of `summary.csv`: a method in a setting over its seeds, next to the paper's numbers.

    `…_std` are standard deviations over seeds. The intervals of `difference` and `ratio_common` are over the common starts, with
    each start's cost averaged over the seeds. They include the variation over starts, not that of training. Ratios are to the
    expert under the same protocol.
    """

    setting: str
    method: str
    label: str
    seeds: int
    paper_mean: float | None
    paper_std: float | None
    paper_ratio: float | None
    test_mean: float
    test_std: float | None
    test_ratio: float
    common_starts: int
    common_mean: float
    common_std: float | None
    common_ratio: Estimate
    difference: Estimate
    control_mse_common: float
    seconds_mean: float | None


def summarise(evaluations: Sequence[Evaluation]) -> list[Summary]:
    """Return one `Summary` per setting and method, in the order of their first appearance."""
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault((evaluation.result.setting, evaluation.result.method), []).append(evaluation)
    printed = {(row.task, row.method): row for row in paper_numbers(PAPER_TABLE)}
    return [_summary(setting, method, group, printed) for (setting, method), group in groups.items()]


def write_report(evaluations: Sequence[Evaluation], out: Path, *, preface: str, console: Console) -> None:
    """Write `seeds.csv`, `summary.csv` and `summary.md` to `out`, and print the summary."""
    summaries = summarise(evaluations)
    write_csv(out / "seeds.csv", [evaluation.result for evaluation in evaluations])
    write_csv(out / "summary.csv", summaries)
    write_page(
        out, "Table 8: summed cost of 20 open-loop torques", [preface, markdown_table(_columns(summaries)), _NOTES]
    )
    title = f"Table 8, {summaries[0].label}: ratio of the cost to the expert's, lower is better"
    console.print(screen_table(title, _screen_columns(summaries)))


_NOTES = """\
**test**: each seed's own 10 test trajectories, our interpretation of the paper's protocol. **common**: the same starts for
every method and seed, uniform in ±90° and ±1 rad/s, sampled independently of all training data. Brackets are 95 %
intervals over the common starts, with each start's cost averaged over seeds (difference: normal, paired with the
expert on the same start; ratio: percentile bootstrap). ± is the standard deviation over seeds. The paper's costs depend
on its own starts, which are unknown: compare ratios. The row `bc` is ours and not in the paper."""


def _summary(
    setting: str, method: str, group: Sequence[Evaluation], printed: dict[tuple[str, str], PaperNumber]
) -> Summary:
    results = [evaluation.result for evaluation in group]
    paper, paper_expert = printed.get((setting, PRINTED_AS.get(method, method))), printed[setting, "expert"]
    tests = np.array([result.cost_test for result in results])
    commons = np.array([result.cost_common for result in results])
    costs = np.mean([evaluation.costs for evaluation in group], axis=0)
    expert = np.mean([evaluation.expert_costs for evaluation in group], axis=0)
    seconds = [result.seconds for result in results if result.seconds is not None]
    return Summary(
        setting=setting,
        method=method,
        label=results[0].label,
        seeds=len(results),
        paper_mean=paper.mean if paper else None,
        paper_std=paper.std if paper else None,
        paper_ratio=paper.mean / paper_expert.mean if paper else None,
        test_mean=float(tests.mean()),
        test_std=spread(tests),
        test_ratio=float(tests.mean() / np.mean([result.expert_test for result in results])),
        common_starts=len(costs),
        common_mean=float(commons.mean()),
        common_std=spread(commons),
        common_ratio=ratio_interval(costs, expert, np.random.default_rng(BOOTSTRAP_SEED)),
        difference=paired_difference(costs, expert),
        control_mse_common=float(np.mean([result.control_mse_common for result in results])),
        seconds_mean=float(np.mean(seconds)) if seconds else None,
    )


def _screen_columns(rows: Sequence[Summary]) -> list[Column]:
    """Return the columns for the terminal, which fit in 80 characters."""
    texts = {
        "setting": [row.setting for row in rows],
        "method": [row.method for row in rows],
        "paper": [number(row.paper_ratio) for row in rows],
        "test": [number(row.test_ratio) for row in rows],
        "common": [number(row.common_ratio.value) for row in rows],
        "cost − expert's [95 %]": [interval(row.difference, 2, signed=True) for row in rows],
    }
    return columns(texts)


def _columns(rows: Sequence[Summary]) -> list[Column]:
    starts = rows[0].common_starts
    texts = {
        "setting": [row.setting for row in rows],
        "method": [row.method for row in rows],
        "paper": [plus_minus(row.paper_mean, row.paper_std) for row in rows],
        "paper ratio": [number(row.paper_ratio) for row in rows],
        "test (10 per seed)": [plus_minus(row.test_mean, row.test_std) for row in rows],
        "test ratio": [number(row.test_ratio) for row in rows],
        f"common ({starts})": [number(row.common_mean) for row in rows],
        "± seeds": [number(row.common_std) for row in rows],
        "common ratio": [interval(row.common_ratio) for row in rows],
        "minus expert": [interval(row.difference, signed=True) for row in rows],
        "control MSE": [number(row.control_mse_common, 4) for row in rows],
        "training, s": [number(row.seconds_mean, 0) for row in rows],
        "seeds": [str(row.seeds) for row in rows],
        "label": [row.label.partition(" ")[0] for row in rows],
    }
    return columns(texts)
