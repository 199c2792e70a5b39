"""Tables and figure of `mismatch_latent`: returns, paired differences and diagnostics by cell."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from difftori.experiments.diagnostics import logged
from difftori.experiments.paper.figure5 import FORMS, Form
from difftori.experiments.plots import draw_side_by_side, footnote, shared_legend, style
from difftori.experiments.rl_study import Curves, full_return, observation
from difftori.experiments.rl_tables import differences
from difftori.experiments.statistics import Estimate, student_interval
from difftori.experiments.study import Method, Result
from difftori.experiments.tables import Column, columns, interval, number

Shaping = Literal["on", "off"]
_LOSSES = ("consistency_loss", "reward_loss", "value_loss")
_CELL = "(latent / distractors / shaping)"

NOTES = f"""\
A cell is {_CELL[1:-1]}: latent dimension, number of distractors, and whether the losses of reward and value train encoder and dynamics.
`off`: return of the last evaluation without the term, with Student's 95 % interval over seeds; the next columns are the differences of
the other forms from it, paired by seed (all tasks: the mean of the tasks' means, with its stratified bootstrap interval). `flipped`: the
opposite sign of c_0. The diagnostics are
medians over all evaluations of all runs after the first update: `encoder` and `dynamics`, the cosine of the term's gradient and that of
Eq. 3 on the same batch; `gain`, Q̃(s, planner) − Q̃(s, prior); and the losses of Eq. 3 (consistency, reward, value) without weights."""


@dataclass(frozen=True)
class Cell:
    """A setting in which the forms of the term are compared."""

    latent_dim: int
    distractors: int
    shaping: Shaping

    def method(self, form: Form) -> Method:
        """Return DiffTORI in this cell with a form of the term."""
        shaping = {} if self.shaping == "on" else {"reward_shapes_latent": False}
        return replace(
            FORMS[form],
            label=f"{form}, latent {self.latent_dim}, {self.distractors} distractors, shaping {self.shaping}",
            settings={**FORMS[form].settings, "latent_dim": self.latent_dim, **shaping},
            options={"distractors": self.distractors} if self.distractors else {},
        )


@dataclass(frozen=True)
class CellResult:
    """One row of `cells.csv`: a form of the term in a cell, over finished runs.

    `final` is the return of the last evaluation, `area` the mean of all, with Student's 95 % intervals over seeds. The others are
    medians over evaluations, empty if nothing was logged.
    """

    task: str
    latent_dim: int
    distractors: int
    reward_shaping: Shaping
    form: str
    runs: int
    final: Estimate
    area: Estimate
    cosine_encoder: float | None
    cosine_dynamics: float | None
    cosine_reward: float | None
    cosine_q: float | None
    gain: float | None
    consistency_loss: float | None
    reward_loss: float | None
    value_loss: float | None
    label: str

    @property
    def cell(self) -> Cell:
        """The cell of the row."""
        return Cell(self.latent_dim, self.distractors, self.reward_shaping)


@dataclass(frozen=True)
class Advantage:
    """One row of `differences.csv`: form − `off` over pairs of runs of the same cell, task and seed, with its 95 % interval."""

    task: str
    latent_dim: int
    distractors: int
    reward_shaping: Shaping
    form: str
    measure: str
    pairs: int
    value: Estimate
    label: str

    @property
    def cell(self) -> Cell:
        """The cell of the row."""
        return Cell(self.latent_dim, self.distractors, self.reward_shaping)


def cell_results(curves: Curves, cells: Sequence[Cell], forms: Sequence[Form]) -> list[CellResult]:
    """Return one row per task, cell and form that has finished runs."""
    rows = []
    for task in curves.tasks:
        for cell in cells:
            for form in forms:
                results = [r for r in curves.of(task, cell.method(form).label).values() if r.finished]
                if results:
                    rows.append(_cell_result(results, task, cell, form, curves.label))
    return rows


def advantages(curves: Curves, cells: Sequence[Cell], forms: Sequence[Form]) -> list[Advantage]:
    """Return the differences of every form from `off` within each cell, by task and over all tasks; see `differences`."""
    rows = []
    for cell in cells:
        methods = {cell.method(form).label: form for form in forms}
        inside = replace(curves, methods=tuple(cell.method(form) for form in forms))
        place = (cell.latent_dim, cell.distractors, cell.shaping)
        rows += [
            Advantage(row.task, *place, methods[row.method], row.measure, row.pairs, row.value, row.label)
            for row in differences(inside, cell.method("off").label)
        ]
    order = list(dict.fromkeys([*curves.tasks, *(row.task for row in rows)]))
    return sorted(rows, key=lambda row: order.index(row.task))


def tables(curves: Curves, cells: Sequence[Cell], forms: Sequence[Form]) -> dict[str, list[Column]]:
    """Return the tables of the study by title: returns and differences, and diagnostics."""
    results = cell_results(curves, cells, forms)
    return {
        f"return by cell {_CELL}": _returns(curves, results, advantages(curves, cells, forms), forms),
        f"diagnostics by cell {_CELL}": _diagnostics(results),
    }


def draw_advantages(curves: Curves, rows: Sequence[Advantage]) -> Figure | None:
    """Plot the paired differences of the final return over latent dimensions; None without rows.

    One column of panels per number of distractors, one row per task and kind of reward shaping.
    """
    shown = [row for row in rows if row.measure == "final"]
    if not shown:
        return None
    across = sorted({row.distractors for row in shown})
    down = list(dict.fromkeys((row.task, row.reward_shaping) for row in shown))
    forms, sizes = list(dict.fromkeys(row.form for row in shown)), sorted({row.latent_dim for row in shown})
    partial = "partial study · " if curves.reasons else ""
    with style():
        figure = Figure(figsize=(3.0 * len(across) + 1.0, 1.9 * len(down) + 1.3), layout="constrained")
        axes = figure.subplots(len(down), len(across), squeeze=False, sharex=True, sharey="row")
        for line, (task, shaping) in zip(axes, down, strict=True):
            for axis, count in zip(line, across, strict=True):
                inside = [
                    row for row in shown if (row.task, row.reward_shaping, row.distractors) == (task, shaping, count)
                ]
                _draw_panel(axis, inside, forms, sizes)
                axis.set_title(f"{task}, {count} distractors")
            low, high = line[0].get_ylim()  # intervals from two pairs may exceed the largest possible difference
            line[0].set_ylim(max(low, -full_return(curves.options)), min(high, full_return(curves.options)))
            line[0].set_ylabel(f"shaping {shaping}\nform − off")
        for axis in axes[-1]:
            axis.set_xlabel("latent dimension")
        shared_legend(figure, forms)
        footnote(figure, f"{partial}differences of the final return, paired by seed; bars: 95 %")
    return figure


def _draw_panel(axis: Axes, rows: Sequence[Advantage], forms: Sequence[str], sizes: Sequence[int]) -> None:
    """Plot each form's differences with their intervals, side by side at each latent dimension."""
    series = {form: {sizes.index(row.latent_dim): row.value for row in rows if row.form == form} for form in forms}
    draw_side_by_side(axis, series, [str(size) for size in sizes])


def _cell_result(results: Sequence[Result], task: str, cell: Cell, form: Form, label: str) -> CellResult:
    rows = [row for result in results for row in result.record.returns]

    def median(name: str) -> float | None:
        values = logged(rows, name)
        return float(np.median(values)) if values else None

    return CellResult(
        task=task,
        latent_dim=cell.latent_dim,
        distractors=cell.distractors,
        reward_shaping=cell.shaping,
        form=form,
        runs=len(results),
        final=student_interval(np.array([result.returns[-1] for result in results])),
        area=student_interval(np.array([result.area for result in results])),
        cosine_encoder=median("diagnosis/cosine/encoder"),
        cosine_dynamics=median("diagnosis/cosine/dynamics"),
        cosine_reward=median("diagnosis/cosine/reward"),
        cosine_q=median("diagnosis/cosine/q"),
        gain=median("diagnosis/gain"),
        consistency_loss=median("diagnosis/consistency_loss"),
        reward_loss=median("diagnosis/reward_loss"),
        value_loss=median("diagnosis/value_loss"),
        label=label,
    )


def _returns(
    curves: Curves, results: Sequence[CellResult], gains: Sequence[Advantage], forms: Sequence[Form]
) -> list[Column]:
    """Return the columns of the map: one row per task and cell."""
    digits = 3 if observation(curves.options) == "probe" else 0
    finals = {(row.task, row.cell): row for row in results if row.form == "off"}
    values = {(row.task, row.cell, row.form): row for row in gains if row.measure == "final"}
    lines = list(dict.fromkeys([(row.task, row.cell) for row in (*results, *gains)]))
    texts = _places(lines)
    texts["off [95 %]"] = [interval(finals[line].final, digits) if line in finals else "–" for line in lines]
    for form in forms[1:]:
        found = [values.get((*line, form)) for line in lines]
        texts[f"{form} − off"] = ["–" if row is None else interval(row.value, digits, signed=True) for row in found]
    counts = [[row.pairs for form in forms[1:] if (row := values.get((*line, form)))] for line in lines]
    texts["pairs"] = ["–".join(map(str, sorted({min(found), max(found)}))) if found else "0" for found in counts]
    return columns(texts)


def _diagnostics(results: Sequence[CellResult]) -> list[Column]:
    texts = _places([(row.task, row.cell) for row in results])
    texts |= {
        "form": [row.form for row in results],
        "encoder": [_signed(row.cosine_encoder, 2) for row in results],
        "dynamics": [_signed(row.cosine_dynamics, 2) for row in results],
        "gain": [_signed(row.gain, 3) for row in results],
    }
    for name in _LOSSES:
        texts[name.removesuffix("_loss")] = [_short(getattr(row, name)) for row in results]
    return columns(texts)


def _places(lines: Sequence[tuple[str, Cell]]) -> dict[str, list[str]]:
    return {
        "task": [task for task, _ in lines],
        "cell": [f"{c.latent_dim} / {c.distractors} / {c.shaping}" for _, c in lines],
    }


def _signed(value: float | None, digits: int) -> str:
    return number(None) if value is None else f"{value:+.{digits}f}"


def _short(value: float | None) -> str:
    return number(None) if value is None else f"{value:.2g}"
