"""Tables and figures of `difftori bench solver`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.measuring import quartiles
from benchmarks.records import write_csv, write_figure
from benchmarks.solver_entries import ENTRIES, Cell
from benchmarks.solver_quality import Quality
from benchmarks.solver_timing import Sample


@dataclass(frozen=True)
class Line:
    """One entry on one cell. Milliseconds as median and quartiles. `speedup`: the reference entry's median total (forward
    only, for entries without gradient) divided by this one's. `peak_mb`: growth of resident memory.
    """

    cell: Cell
    entry: str
    repeats: int
    first_call_ms: float
    forward_ms: float
    forward_q1: float
    forward_q3: float
    backward_ms: float
    backward_q1: float
    backward_q3: float
    speedup: float
    peak_mb: float
    quality: Quality | None


def summarise(samples: list[Sample], memory: Mapping[tuple[Cell, str], float], quality: list[Quality]) -> list[Line]:
    """Medians, quartiles and ratios, one line for each entry of each cell, in the order of first appearance."""
    lines: list[Line] = []
    for cell, name in dict.fromkeys((sample.cell, sample.entry) for sample in samples):
        own = [s for s in samples if (s.cell, s.entry) == (cell, name)]
        timed = [s for s in own if s.repeat >= 0]
        forward, backward = quartiles([s.forward_ms for s in timed]), quartiles([s.backward_ms for s in timed])
        line = Line(
            cell=cell,
            entry=name,
            repeats=len(timed),
            first_call_ms=sum(s.forward_ms + s.backward_ms for s in own if s.repeat < 0),
            forward_ms=forward[1],
            forward_q1=forward[0],
            forward_q3=forward[2],
            backward_ms=backward[1],
            backward_q1=backward[0],
            backward_q3=backward[2],
            speedup=1.0,
            peak_mb=memory.get((cell, name), math.nan),
            quality=_quality_of(cell, name, quality),
        )
        reference = next((line for line in lines if line.cell == cell), line)
        forward_only = math.isnan(line.backward_ms)
        lines.append(replace(line, speedup=_total(reference, forward_only) / _total(line, forward_only)))
    return lines


def _total(line: Line, forward_only: bool) -> float:
    return line.forward_ms if forward_only else line.forward_ms + line.backward_ms


def _quality_of(cell: Cell, name: str, quality: list[Quality]) -> Quality | None:
    same = [q for q in quality if (q.cell.problem, q.cell.horizon, q.entry) == (cell.problem, cell.horizon, name)]
    return same[0] if same else None


_QUALITY = [f.name for f in fields(Quality) if f.name not in ("cell", "entry")]
_TIMES = [f.name for f in fields(Line) if f.name not in ("cell", "entry", "quality")]


def write_raw(path: Path, samples: Sequence[Sample]) -> None:
    """Write every single run."""
    rows = []
    for s in samples:
        times = {"forward_ms": f"{s.forward_ms:.4f}", "backward_ms": f"{s.backward_ms:.4f}"}
        rows.append({**asdict(s.cell), "entry": s.entry, "repeat": s.repeat, **times})
    write_csv(path, rows)


def write_summary(path: Path, lines: Sequence[Line]) -> None:
    """Write medians, quartiles, ratios, memory, and the quality of the same entry on the same problem."""
    rows = []
    for line in lines:
        times = {name: getattr(line, name) for name in _TIMES}
        quality = {f"quality_{name}": getattr(line.quality, name, math.nan) for name in _QUALITY}
        rows.append({**asdict(line.cell), "entry": line.entry, **times, **quality})
    write_csv(path, rows)


def table(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The summary as text for a screen of 80 columns. The CSV also has memory and errors."""
    return [
        {
            "problem": str(line.cell),
            "entry": line.entry,
            "ms": " + ".join(filter(None, (_short(line.forward_ms), _short(line.backward_ms)))),
            "ratio": f"{line.speedup:.1f}x",
            **_marks(line.quality),
        }
        for line in lines
    ]


def _marks(quality: Quality | None) -> dict[str, str]:
    if quality is None:
        return dict.fromkeys(("return", "cosine", "> .95"), "")
    return {
        "return": f"{quality.reached:.2f}",
        "cosine": _short(quality.cosine, 3),
        "> .95": "" if math.isnan(quality.aligned) else f"{quality.aligned:.0%}",
    }


def _short(value: float, digits: int = 1) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.{digits}f}"


def write_plots(path: Path, lines: Sequence[Line]) -> None:
    """Plot for each problem: time over batch size, the objective reached over time, and the cosine of the gradient over time."""
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys((line.cell.problem, line.cell.horizon) for line in lines))
    figure = Figure(figsize=(13, 3.6 * len(problems)), layout="constrained")
    axes = figure.subplots(len(problems), 3, squeeze=False)
    for row, (problem, horizon) in zip(axes, problems, strict=True):
        chosen = [line for line in lines if (line.cell.problem, line.cell.horizon) == (problem, horizon)]
        _draw(row, f"{problem}, H={horizon}", chosen)
    write_figure(path, figure)


def _draw(row: Any, title: str, lines: list[Line]) -> None:
    largest = max(line.cell.batch for line in lines)
    order = [entry.name for entry in ENTRIES[lines[0].cell.problem]]
    for name in dict.fromkeys(line.entry for line in lines):
        own = sorted((line for line in lines if line.entry == name), key=lambda line: line.cell.batch)
        totals = [_total(line, math.isnan(line.backward_ms)) for line in own]
        color = f"C{order.index(name) % 10}"
        row[0].plot([line.cell.batch for line in own], totals, "o-", color=color, label=name)
        quality = own[-1].quality
        if quality is None:
            continue
        row[1].plot(totals[-1], quality.reached, "o", color=color)
        if not math.isnan(quality.cosine):
            row[2].plot(totals[-1], quality.cosine, "o", color=color)
    row[0].set(xscale="log", yscale="log", title=title, xlabel="rows", ylabel="forward + backward, ms")
    row[0].legend(fontsize=6)
    row[1].set(xscale="log", xlabel=f"ms at {largest} rows, or the most measured", ylabel="mean return reached")
    row[2].set(
        xscale="log", xlabel=f"ms at {largest} rows, or the most measured", ylabel="cosine with the true gradient"
    )
