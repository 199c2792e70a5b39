"""Writes a study's numbers: CSV for machines, Markdown for people, and a table on the screen."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from difftori.errors import ConfigError
from difftori.experiments.statistics import Estimate


@dataclass(frozen=True)
class Column:
    """One column of a table for people: its heading and the text of each line."""

    heading: str
    cells: tuple[str, ...]
    left: bool = False


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Writes dataclass instances of one type, one line each, with the fields as header; None becomes empty."""
    if not rows:
        raise ConfigError([f"nothing to write to {path}: the study produced no rows; choose at least one method"])
    names = [field.name for field in fields(rows[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([_plain(getattr(row, name)) for name in names])


def markdown_table(columns: Sequence[Column]) -> str:
    """The columns as a Markdown table, numbers to the right."""
    lines = [
        "| " + " | ".join(column.heading for column in columns) + " |",
        "|" + "|".join("---" if column.left else "---:" for column in columns) + "|",
    ]
    for cells in zip(*(column.cells for column in columns), strict=True):
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def screen_table(title: str, columns: Sequence[Column]) -> Table:
    """The columns as a rich table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column.heading, justify="left" if column.left else "right")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table


def number(value: float | None, digits: int = 3) -> str:
    """The value to `digits` decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def plus_minus(value: float | None, deviation: float | None, digits: int = 3) -> str:
    """`value ± deviation`, the deviation left out where there is none."""
    return number(value, digits) + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def interval(estimate: Estimate, digits: int = 3, *, signed: bool = False) -> str:
    """`value [low, high]`, with signs if asked."""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
