"""The figures of a run's page: its logged metrics over the steps, in groups, results first."""

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

RESULTS = ("return", "success", "score", "excess_cost")
"""The results of a policy, by the last part of a metric's name, most important first."""
_GROUPS = {
    "eval": "evaluation",
    "validation": "evaluation",
    "train": "training",
    "update": "losses and gradients, means over updates",
    "diagnosis": "planner and policy gradient",
    "seconds": "time",
}
"""Headings of the groups by the first part of a metric's name, in the order of the page."""
_OTHER = "other"
_COUNTS = ("step", "time", "epoch", "episode", "updates", "eval/episodes")
"""Entries of a row that only count."""
_COLUMNS = 3
_TITLE = 34
_FEW = 30
_WIDE_RANGE = 100.0
_MARGINS = (0.6, 0.15, 0.4, 0.3, 0.75, 0.55)
"""Inches: left, right, bottom and top of the figure, and between panels, across and down."""
_LINE = 0.17
"""Inches for each further line of a title."""

Points = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Panel:
    """One panel: its title, and its lines by their name in the legend. `linear`: never a logarithmic axis."""

    title: str
    lines: dict[str, Points]
    linear: bool = False


def metric_figures(rows: Sequence[dict], xlabel: str = "step") -> dict[str, Figure]:
    """Plot each metric over the step, in one figure for each group, by the group's heading. Empty groups are omitted.

    Results are on linear axes, with the training episodes and the evaluations of one measure in one panel. Other metrics
    have a logarithmic axis if they are positive and differ by a factor of more than 100.
    """
    found = {name: _points(rows, name) for name in _names(rows)}
    grouped: dict[str, list[Panel]] = {"results": _results(found)}
    shown = {name for panel in grouped["results"] for name in panel.lines}
    for heading in dict.fromkeys([*_GROUPS.values(), _OTHER]):
        own = [n for n in found if n not in shown and _GROUPS.get(n.partition("/")[0], _OTHER) == heading]
        grouped[heading] = [Panel(name, {name: found[name]}) for name in own]
    if time := grouped["time"]:
        grouped["time"] = [
            Panel("seconds since the start", {n: p for panel in time for n, p in panel.lines.items()}, True)
        ]
    end = max((row["step"] for row in rows), default=0)
    return {
        heading: _figure(panels, xlabel, end, large=heading in ("results", "time"))
        for heading, panels in grouped.items()
        if panels
    }


def thousands(value: float, _: int | None = None) -> str:
    """Format a tick label: 20000 is `20k`, 1500000 is `1.5M`."""
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"


def svg_element(figure: Figure) -> str:
    """Convert a figure to a single <svg> element, without XML declaration, document type and metadata with URLs."""
    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "difftori"}):
        FigureCanvasSVG(figure).print_svg(drawing, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", drawing.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :]


def _names(rows: Sequence[dict]) -> list[str]:
    """Return the names of the metrics that have a number, in the order in which they were first logged."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if type(value) in (int, float))
    return [name for name in names if name not in _COUNTS]


def _points(rows: Sequence[dict], name: str) -> Points:
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def _results(found: dict[str, Points]) -> list[Panel]:
    """Return one panel for each measure of success, with training and evaluation; without one, the validation error."""
    panels = []
    for measure in RESULTS:
        lines = {name: found[name] for name in (f"train/{measure}", f"eval/{measure}") if name in found}
        if lines:
            panels.append(Panel(measure if len(lines) > 1 else next(iter(lines)), lines, linear=True))
    if not panels and (error := "validation/error") in found:
        panels.append(Panel(error, {error: found[error]}))
    return panels


def _figure(panels: Sequence[Panel], xlabel: str, end: int, *, large: bool) -> Figure:
    columns = min(_COLUMNS, len(panels))
    down = -(-len(panels) // columns)
    width, height = (6.0, 3.0) if large else (4.0, 2.5)
    with matplotlib.rc_context({"font.size": 8, "text.parse_math": False}):  # names may contain characters of formulas
        titles = _LINE * max(_title(panel).count("\n") for panel in panels)
        figure = Figure(figsize=(width * columns, (height + titles) * down))
        _place(figure, columns, down, titles)
        axes = figure.subplots(down, columns, squeeze=False).flat
        for index, axis in enumerate(axes):
            if index >= len(panels):
                axis.set_axis_off()
                continue
            _draw(axis, panels[index])
            axis.set_xlim(-0.03 * max(end, 1), 1.03 * max(end, 1))
            if index + columns >= len(panels):
                axis.set_xlabel(xlabel)
    return figure


def _place(figure: Figure, columns: int, down: int, titles: float) -> None:
    """Set fixed margins and gaps, with room (inches) for titles of several lines. A computed layout takes longer than the drawing."""
    width, height = figure.get_size_inches()
    left, right, bottom, top, across, between = _MARGINS
    top, between = top + titles, between + titles
    panel = (width - left - right - across * (columns - 1)) / columns
    row = (height - bottom - top - between * (down - 1)) / down
    figure.subplots_adjust(
        left / width, bottom / height, 1 - right / width, 1 - top / height, across / panel, between / row
    )


def _title(panel: Panel) -> str:
    return "\n".join(textwrap.wrap(panel.title, _TITLE))


def _draw(axis: Axes, panel: Panel) -> None:
    for name, (steps, values) in panel.lines.items():
        few = len(steps) < _FEW
        faint = len(panel.lines) > 1 and name.startswith("train/")
        axis.plot(
            steps, values, marker="o" if few else "", markersize=3, linewidth=1, alpha=0.5 if faint else 1, label=name
        )
    every = np.concatenate([values for _, values in panel.lines.values()])
    if not panel.linear and every.min() > 0 and every.max() > _WIDE_RANGE * every.min():
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter("")
    axis.yaxis.set_major_formatter("{x:g}")  # plain text: mathematical labels would be shown as their source
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(thousands))
    axis.set_title(_title(panel))
    axis.grid(alpha=0.3)
    if len(panel.lines) > 1:
        axis.legend(fontsize=7)
