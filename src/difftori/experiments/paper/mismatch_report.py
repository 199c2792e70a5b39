"""Tables and the figure of `difftori study mismatch`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from difftori.experiments.paper.mismatch_systems import SYSTEMS
from difftori.experiments.plots import draw_side_by_side, footnote, save_svg, shared_legend, style
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

COMPARED = ("return", "both", "network", "flipped", "exact")
_NOTE = (
    "Closed-loop cost of 40 steps from held-out starts, the same for all. Gain: the cost with identified parameters minus that of the "
    "form, paired by seed, the mean over starts, with Student's 95 % interval over seeds, in percent of the identified cost."
)


@dataclass(frozen=True)
class LevelRecord:
    """A finished level. Arrays as in `Level`: costs (seeds, starts), parameters (seeds, P), history (epochs, seeds)."""

    system: str
    friction: float
    horizon: int
    seconds: float
    hardware: str
    command: str
    costs: Mapping[str, np.ndarray]
    parameters: Mapping[str, np.ndarray]
    history: Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class LevelRow:
    """One row of `levels.csv`: a form at a level. Cosines and the prediction error are medians over epochs and seeds."""

    system: str
    friction: float
    horizon: int
    form: str
    seeds: int
    cost: float
    gain_percent: Estimate
    prediction_error: float
    cosine_exact: float | None
    cosine_prediction: float | None
    valid_gradients: float
    seconds: float
    label: str


@dataclass(frozen=True)
class ParameterRow:
    """One row of `parameters.csv`: the mean and the spread over seeds of a parameter."""

    system: str
    friction: float
    horizon: int
    form: str
    parameter: str
    true: float
    mean: float
    spread: float


def gain(record: LevelRecord, form: str) -> Estimate:
    """Return the gain of a form over identification, in percent of the identified cost, with Student's interval over seeds."""
    reference, costs = record.costs["identified"].mean(1), record.costs[form].mean(1)
    return student_interval(100 * (reference - costs) / reference.mean())


def write_report(records: Sequence[LevelRecord], out: Path, *, label: str, console: Console) -> None:
    """Write `levels.csv`, `parameters.csv`, `gain.svg` and `summary.md`, and print the table."""
    if not records:
        console.print("No level is finished.")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "levels.csv", [row for record in records for row in _rows(record, label)])
    write_csv(out / "parameters.csv", [row for record in records for row in _parameters(record)])
    save_svg(gain_figure(records, label), out / "gain.svg")
    table = _table(records)
    preface = f"{'Full study' if label == 'full' else f'**{label}**'}. {_NOTE}"
    minutes = sum(record.seconds for record in records) / 60
    hardware = ", ".join(dict.fromkeys(record.hardware for record in records))
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(record.command for record in records))
    origin = f"{hardware}; {minutes:.0f} minutes in all. Created by {commands}."
    write_page(out, "Objective mismatch", [preface, markdown_table(table), "![gain](gain.svg)", origin])
    console.print(screen_table(f"study mismatch, {label}", table))
    console.print(f"Tables and the figure are in {out}.", soft_wrap=True)


def gain_figure(records: Sequence[LevelRecord], label: str) -> Figure:
    """The gain of each form over the friction that the model lacks, one panel for each system and horizon."""
    panels = list(dict.fromkeys((record.system, record.horizon) for record in records))
    with style():
        figure = Figure(figsize=(3.6 * len(panels) + 1.0, 3.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, [record for record in records if (record.system, record.horizon) == panel])
            axis.set_title(f"{panel[0]}, horizon {panel[1]}")
            axis.set_xlabel("friction that the model lacks")
        axes[0].set_ylabel("gain over identification (%)")
        shared_legend(figure, COMPARED, columns=4)
        footnote(figure, _NOTE if label == "full" else f"{label}. {_NOTE}")
    return figure


def _draw(axis: Axes, records: Sequence[LevelRecord]) -> None:
    records = sorted(records, key=lambda record: record.friction)
    series = {form: {place: gain(record, form) for place, record in enumerate(records)} for form in COMPARED}
    draw_side_by_side(axis, series, [f"{record.friction:g}" for record in records])


def _rows(record: LevelRecord, label: str) -> list[LevelRow]:
    found = []
    for form, measures in record.history.items():
        medians = {name: float(np.median(values)) for name, values in measures.items()}
        found.append(
            LevelRow(
                system=record.system,
                friction=record.friction,
                horizon=record.horizon,
                form=form,
                seeds=len(record.costs[form]),
                cost=float(record.costs[form].mean()),
                gain_percent=gain(record, form),
                prediction_error=medians["prediction error"],
                cosine_exact=medians.get("cosine of critic's and exact gradient"),
                cosine_prediction=medians.get("cosine of policy and prediction gradient"),
                valid_gradients=float(np.mean(measures["valid gradients"])),
                seconds=record.seconds,
                label=label,
            )
        )
    return found


def _parameters(record: LevelRecord) -> list[ParameterRow]:
    return [
        ParameterRow(
            record.system,
            record.friction,
            record.horizon,
            form,
            name,
            true,
            float(values[:, index].mean()),
            float(values[:, index].std(ddof=1)),
        )
        for form, values in record.parameters.items()
        for index, (name, true) in enumerate(SYSTEMS[record.system].parameters.items())
    ]


def _table(records: Sequence[LevelRecord]) -> list[Column]:
    def cost(name: str) -> list[str]:
        return [number(float(record.costs[name].mean()), 1) for record in records]

    gains = {
        f"{form}, gain %": [interval(gain(record, form), 1, signed=True) for record in records] for form in COMPARED
    }
    return columns(
        {
            "task": [record.system for record in records],
            "friction": [f"{record.friction:g}" for record in records],
            "horizon": [str(record.horizon) for record in records],
            "true parameters": cost("true parameters"),
            "identified": cost("identified"),
            "true system": cost("true system"),
            **gains,
        }
    )
