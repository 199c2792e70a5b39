"""Tables, picture and provenance of a comparison: CSV, SVG and JSON."""

import csv
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.solver_entries import ENTRIES, Cell
from benchmarks.solver_quality import Quality
from benchmarks.solver_timing import Sample


@dataclass(frozen=True)
class Line:
    """One entry on one cell. Milliseconds as median and quartiles; `speedup`: the reference entry's median total
    (forward only, for entries without gradient) divided by this one's; `peak_mb`: growth of resident memory.
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
        forward, backward = _quartiles(s.forward_ms for s in timed), _quartiles(s.backward_ms for s in timed)
        reference = next((line for line in lines if line.cell == cell), None)
        of_reference = _total(reference, math.isnan(backward[1])) if reference else math.nan
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
            speedup=math.nan,
            peak_mb=memory.get((cell, name), math.nan),
            quality=_quality_of(cell, name, quality),
        )
        speedup = of_reference / _total(line, math.isnan(line.backward_ms)) if reference else 1.0
        lines.append(Line(**{**{f.name: getattr(line, f.name) for f in fields(line)}, "speedup": speedup}))
    return lines


def _total(line: Line, forward_only: bool) -> float:
    return line.forward_ms if forward_only else line.forward_ms + line.backward_ms


def _quality_of(cell: Cell, name: str, quality: list[Quality]) -> Quality | None:
    same = [q for q in quality if (q.cell.problem, q.cell.horizon, q.entry) == (cell.problem, cell.horizon, name)]
    return same[0] if same else None


def _quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    found = sorted(values)
    if not found or any(math.isnan(value) for value in found):
        return math.nan, math.nan, math.nan
    if len(found) == 1:
        return found[0], found[0], found[0]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, middle, high


_QUALITY = [f.name for f in fields(Quality) if f.name not in ("cell", "entry")]
_TIMES = [f.name for f in fields(Line) if f.name not in ("cell", "entry", "quality")]


def write_raw(path: Path, samples: list[Sample]) -> None:
    """Every single run."""
    rows = [[*_cell(s.cell), s.entry, s.repeat, f"{s.forward_ms:.4f}", f"{s.backward_ms:.4f}"] for s in samples]
    write_csv(path, ["problem", "horizon", "batch", "entry", "repeat", "forward_ms", "backward_ms"], rows)


def write_summary(path: Path, lines: list[Line]) -> None:
    """Medians, quartiles, ratios, memory, and beside them the quality of the same entry on the same problem."""
    rows = []
    for line in lines:
        times = [getattr(line, name) for name in _TIMES]
        marks = [math.nan if line.quality is None else getattr(line.quality, name) for name in _QUALITY]
        rows.append([*_cell(line.cell), line.entry, *map(_number, times), *map(_number, marks)])
    write_csv(path, ["problem", "horizon", "batch", "entry", *_TIMES, *(f"quality_{n}" for n in _QUALITY)], rows)


def _cell(cell: Cell) -> list[Any]:
    return [cell.problem, cell.horizon, cell.batch]


def _number(value: int | float) -> str:
    return f"{value:.6g}"


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    """Write a table whole: an interrupted write leaves the last one."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    partial.replace(path)


def table(lines: list[Line]) -> list[dict[str, str]]:
    """The summary as text for a screen of 80 columns; memory and errors are in the CSV."""
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


def write_picture(path: Path, lines: list[Line]) -> None:
    """For each problem: time over batch size, the objective reached over time, and the gradient's cosine over time."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys((line.cell.problem, line.cell.horizon) for line in lines))
    figure = Figure(figsize=(13, 3.6 * len(problems)), layout="constrained")
    axes = figure.subplots(len(problems), 3, squeeze=False)
    for row, (problem, horizon) in zip(axes, problems, strict=True):
        chosen = [line for line in lines if (line.cell.problem, line.cell.horizon) == (problem, horizon)]
        _draw(row, f"{problem}, H={horizon}", chosen)
    with rc_context({"svg.hashsalt": "difftori", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


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


def write_provenance(path: Path, *, config: dict[str, Any], peers: dict[str, str], seconds: float) -> None:
    """Hardware, versions, threads, settings and command: what is needed to judge the numbers, and to make them anew."""
    packages = ("difftori", "torch", "numpy", "matplotlib")
    record = {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["difftori", *sys.argv[1:]] if Path(sys.argv[0]).name == "difftori" else sys.argv,
        "config": config,
        "seconds": round(seconds, 1),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_at_the_end": [round(load, 2) for load in psutil.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages} | peers,
        "commit": _commit(),
    }
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
