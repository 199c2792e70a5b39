"""Tables and figures of `difftori study steering`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from difftori.experiments.plots import footnote, look, save_svg, shared_legend, style
from difftori.experiments.statistics import Estimate, student_interval
from difftori.experiments.tables import (
    Column,
    columns,
    interval,
    markdown_table,
    number,
    screen_table,
    write_csv,
    write_page,
)

ALLOWED = 0.2
"""Share of the base's violations that a setting may have to be compared."""
NOTES = f"""\
`violations`: number of steps of an episode that violate the requirement, mean over episodes and seeds: `keep-out`, the end effector's path meets
the ball; `smooth`, its speed or jerk is above a limit; `around`, it turns clockwise around the block by more than .1 rad. An episode ends when it
succeeds; the motion of its last step is not measured. `score`: mean of the environment's own measure; success where it has none. `ms`: median time
to plan for all episodes at once (at most 25), of runs that may have shared the machine. All methods act in the same episodes, and the cost depends
on the executed actions only. Intervals: Student's 95 % over seeds.

Figures: one line for each method, from no cost (large marker) to the highest weight; up and left is better.

First table: for each seed, the weight with the best mean score of the other seeds, among those that leave at most {ALLOWED:.0%} of the base's violations
on the other seeds (with one seed: on itself). Seeds without such a weight are left out; `seeds` counts the others. `change`: the score at these
weights minus that of the same policy without cost, paired by seed. Second table: differences of these changes. Their intervals take seeds as
independent, although the weights of one depend on the others."""


@dataclass(frozen=True)
class SteeringMethod:
    """A method: the policy that acts, and whether its finished plan is projected."""

    label: str
    policy: str
    project: bool


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: its job, and numbers of its episodes. `violations` are by requirement, all of them without cost (`requirement` is None)."""

    task: str
    requirement: str | None
    policy: str
    project: bool
    weight: float
    seed: int
    episodes: int
    success: np.ndarray
    score: np.ndarray
    violations: Mapping[str, np.ndarray]
    milliseconds: float
    hardware: str
    command: str


@dataclass(frozen=True)
class SteeringRow:
    """One row of `steering.csv`: a method on a requirement with a weight, over its seeds."""

    task: str
    requirement: str
    method: str
    weight: float
    seeds: int
    episodes: int
    success: float
    score: Estimate
    violations: Estimate
    milliseconds: float


@dataclass(frozen=True)
class ChosenRow:
    """One row of `chosen.csv`: a method at the weights that keep the violations low. NaN: no weight does."""

    task: str
    requirement: str
    method: str
    weights: str
    seeds: int
    score: float
    violations: float
    change: Estimate


@dataclass(frozen=True)
class ContrastRow:
    """One row of `contrasts.csv`: the difference of the changes of two methods, paired by seed."""

    task: str
    requirement: str
    difference: str
    value: Estimate
    pairs: int


@dataclass(frozen=True)
class _Chosen:
    """By seed: the chosen weights, and the evaluations with them and without cost. `seeds`: those that have all weights."""

    seeds: Sequence[int]
    weights: Mapping[int, float]
    with_cost: Mapping[int, Evaluated]
    without: Mapping[int, Evaluated]

    @property
    def changes(self) -> dict[int, float]:
        """The changes of the score by seed."""
        return {seed: float(one.score.mean() - self.without[seed].score.mean()) for seed, one in self.with_cost.items()}


def write_report(
    found: Sequence[Evaluated], methods: Sequence[SteeringMethod], out: Path, *, label: str, console: Console
) -> None:
    """Write `steering.csv`, `chosen.csv`, `contrasts.csv`, a figure for each requirement and `summary.md`, and print the tables."""
    if not found:
        console.print("No evaluation is finished.")
        return
    out.mkdir(parents=True, exist_ok=True)
    rows = summaries(found, methods)
    chosen, contrasts = comparisons(found, methods)
    write_csv(out / "steering.csv", rows)
    write_csv(out / "chosen.csv", chosen)
    write_csv(out / "contrasts.csv", contrasts)
    names = list(dict.fromkeys(row.requirement for row in rows))
    for name in names:
        figure = requirement_figure([row for row in rows if row.requirement == name], name, methods, label)
        save_svg(figure, out / f"{name}.svg")
    tables = {f"at most {ALLOWED:.0%} of the base's violations": _chosen_table(chosen)}
    tables |= {"differences of the changes": _contrast_table(contrasts)} if contrasts else {}
    tables |= {name: _table([row for row in rows if row.requirement == name]) for name in names}
    hardware = ", ".join(dict.fromkeys(one.hardware for one in found))
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(one.command for one in found))
    figures = [f"![{name}]({name}.svg)" for name in names]
    parts = [f"**{heading}**\n\n{markdown_table(table)}" for heading, table in tables.items()]
    write_page(out, "Steering", [f"{label}.", *parts, *figures, NOTES, f"{hardware}. Created by {commands}."])
    for heading, table in tables.items():
        console.print(screen_table(heading, table))
    console.print(f"Tables and figures are in {out} ({label}).", soft_wrap=True)


def summaries(found: Sequence[Evaluated], methods: Sequence[SteeringMethod]) -> list[SteeringRow]:
    """Summarise each method on each requirement, from no cost (weight 0) to the highest weight, over the seeds that it has."""
    rows = []
    for task, name in _requirements(found):
        for method in methods:
            for weight in (0.0, *_weights(found, task, name)):
                if of := _by_seed(found, task, name, method, weight):
                    rows.append(
                        SteeringRow(
                            task,
                            name,
                            method.label,
                            weight,
                            len(of),
                            sum(one.episodes for one in of.values()),
                            float(np.mean([one.success.mean() for one in of.values()])),
                            student_interval(np.array([one.score.mean() for one in of.values()])),
                            student_interval(np.array([one.violations[name].mean() for one in of.values()])),
                            float(np.median([one.milliseconds for one in of.values()])),
                        )
                    )
    return rows


def comparisons(
    found: Sequence[Evaluated], methods: Sequence[SteeringMethod]
) -> tuple[list[ChosenRow], list[ContrastRow]]:
    """Choose the weights of each method, and compare the changes of the score: of the last method and the others, and of guidance and projection."""
    rows, contrasts = [], []
    for task, name in _requirements(found):
        chosen = {method.label: _choose(found, task, name, method) for method in methods}
        rows += [_chosen_row(task, name, label, one) for label, one in chosen.items() if one.seeds]
        *others, last = chosen
        pairs = [(last, other) for other in others] + [(others[1], others[0])]
        for method, reference in pairs:
            first, second = chosen[method].changes, chosen[reference].changes
            if shared := sorted(first.keys() & second.keys()):
                value = student_interval(np.array([first[seed] - second[seed] for seed in shared]))
                contrasts.append(ContrastRow(task, name, f"{method} − {reference}", value, len(shared)))
    return rows, contrasts


def _choose(found: Sequence[Evaluated], task: str, name: str, method: SteeringMethod) -> _Chosen:
    """Choose a weight for each seed on the other seeds, of those seeds that have all weights."""
    base = SteeringMethod("", "base", False)
    plain, without = _by_seed(found, task, name, base, 0.0), _by_seed(found, task, name, method, 0.0)
    by_weight = {weight: _by_seed(found, task, name, method, weight) for weight in _weights(found, task, name)}
    seeds = sorted(set.intersection(*(set(of) for of in (plain, without, *by_weight.values()))))
    weights = {}
    for seed in seeds:
        others = [other for other in seeds if other != seed] or seeds
        limit = ALLOWED * np.mean([plain[other].violations[name].mean() for other in others])
        scores = {
            weight: float(np.mean([of[other].score.mean() for other in others]))
            for weight, of in by_weight.items()
            if np.mean([of[other].violations[name].mean() for other in others]) <= limit
        }
        if scores:
            weights[seed] = max(scores, key=lambda weight: scores[weight])
    return _Chosen(seeds, weights, {seed: by_weight[weight][seed] for seed, weight in weights.items()}, without)


def _chosen_row(task: str, name: str, label: str, chosen: _Chosen) -> ChosenRow:
    if not chosen.weights:
        nothing = Estimate(math.nan, math.nan, math.nan)
        return ChosenRow(task, name, label, "none", 0, math.nan, math.nan, nothing)
    runs = chosen.with_cost.values()
    return ChosenRow(
        task,
        name,
        label,
        " ".join(f"{weight:g}" for weight in dict.fromkeys(chosen.weights.values())),
        len(runs),
        float(np.mean([one.score.mean() for one in runs])),
        float(np.mean([one.violations[name].mean() for one in runs])),
        student_interval(np.array(list(chosen.changes.values()))),
    )


def requirement_figure(rows: Sequence[SteeringRow], name: str, methods: Sequence[SteeringMethod], label: str) -> Figure:
    """The score over the violations, one panel for each task, one line for each method over the weights."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    with style():
        figure = Figure(figsize=(3.4 * len(tasks) + 1.2, 4.0), layout="constrained")
        axes = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axis, task in zip(axes, tasks, strict=True):
            _draw(axis, [row for row in rows if row.task == task], methods)
            axis.set_title(task)
            axis.set_xlabel("violating steps per episode")
        axes[0].set_ylabel("score")
        shared_legend(figure, [method.label for method in methods], columns=3)
        footnote(
            figure, f"{name}; {label}. Large marker: no cost; then rising weight. Bars: Student's 95 % over seeds."
        )
    return figure


def _draw(axis: Axes, rows: Sequence[SteeringRow], methods: Sequence[SteeringMethod]) -> None:
    for index, method in enumerate(methods):
        line = [row for row in rows if row.method == method.label]
        if not line:
            continue
        drawn, x, y = look(index), [row.violations.value for row in line], [row.score.value for row in line]
        axis.plot(
            x, y, color=drawn.color, linestyle=drawn.dashes, marker=drawn.marker, markersize=4, label=method.label
        )
        axis.plot(x[:1], y[:1], color=drawn.color, marker=drawn.marker, markersize=9, linestyle="")
        for row in line:
            if row.score.bounded:
                ends = [max(row.score.low, 0.0), min(row.score.high, 1.0)]
                axis.plot([row.violations.value] * 2, ends, color=drawn.color, linewidth=0.6, alpha=0.5)
    axis.set_xlim(left=0)
    axis.set_ylim(-0.02, 1.02)


def _requirements(found: Sequence[Evaluated]) -> list[tuple[str, str]]:
    """The tasks and requirements that have evaluations with cost."""
    return list(dict.fromkeys((one.task, one.requirement) for one in found if one.requirement is not None))


def _weights(found: Sequence[Evaluated], task: str, name: str) -> list[float]:
    return sorted({one.weight for one in found if (one.task, one.requirement) == (task, name)})


def _by_seed(
    found: Sequence[Evaluated], task: str, name: str, method: SteeringMethod, weight: float
) -> dict[int, Evaluated]:
    """The evaluations by seed. Without weight, those of the policy without cost."""
    if weight == 0:
        wanted = (task, None, method.policy, False, 0.0)
    else:
        wanted = (task, name, method.policy, method.project, weight)
    return {
        one.seed: one for one in found if (one.task, one.requirement, one.policy, one.project, one.weight) == wanted
    }


def _table(rows: Sequence[SteeringRow]) -> list[Column]:
    return columns(
        {
            "task": [row.task for row in rows],
            "method": [row.method for row in rows],
            "weight": [f"{row.weight:g}" for row in rows],
            "seeds": [str(row.seeds) for row in rows],
            "success": [number(row.success, 2) for row in rows],
            "score": [interval(row.score, 2) for row in rows],
            "violations": [interval(row.violations, 1) for row in rows],
            "ms": [number(row.milliseconds, 0) for row in rows],
        }
    )


def _chosen_table(rows: Sequence[ChosenRow]) -> list[Column]:
    return columns(
        {
            "task": [row.task for row in rows],
            "requirement": [row.requirement for row in rows],
            "method": [row.method for row in rows],
            "weight": [row.weights for row in rows],
            "seeds": [str(row.seeds) for row in rows],
            "violations": [number(row.violations if row.seeds else None, 1) for row in rows],
            "score": [number(row.score if row.seeds else None, 2) for row in rows],
            "change": [interval(row.change, 2, signed=True) for row in rows],
        }
    )


def _contrast_table(rows: Sequence[ContrastRow]) -> list[Column]:
    return columns(
        {
            "task": [row.task for row in rows],
            "requirement": [row.requirement for row in rows],
            "difference": [row.difference for row in rows],
            "value [95 %]": [interval(row.value, 2, signed=True) for row in rows],
            "pairs": [str(row.pairs) for row in rows],
        }
    )
