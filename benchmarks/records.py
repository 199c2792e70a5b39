"""Output of benchmarks: tables as CSV, figures as SVG, and a record of settings, machine and versions as JSON."""

import csv
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from difftori.runs.process import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path("benchmarks/results")
"""Default folder of the results. In the root of the checkout, these are the committed results."""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table, with 6 digits for floats. An interrupted write leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    partial.replace(path)


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as SVG. The bytes are reproducible."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "difftori", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def write_record(
    path: Path,
    found: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    device: str = "cpu",
    baselines: Mapping[str, str] | None = None,
) -> None:
    """Write `found` with the command, settings, machine and versions needed to interpret and repeat it."""
    record = {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["difftori", *sys.argv[1:]] if Path(sys.argv[0]).name == "difftori" else sys.argv,
        "config": dict(config),
        "versions": versions(device) | dict(baselines or {}),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_at_the_end": [round(load, 2) for load in psutil.getloadavg()],
        **found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    # A list of numbers is written on one line.
    flat = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), json.dumps(record, indent=1))
    partial.write_text(flat + "\n")
    partial.replace(path)


def as_text(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A table for the screen, with 3 digits for floats."""
    return [{k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]


def raw_ms(samples: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, list[float]]:
    """Every measurement of (method, part), for a record."""
    return {f"{name}: {part}": [round(value, 4) for value in values] for (name, part), values in samples.items()}
