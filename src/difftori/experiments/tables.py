"""Tables of studies and reports, as CSV, Markdown, LaTeX, and in the terminal."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from difftori.experiments.statistics import Estimate


@dataclass(frozen=True)
class Column:
    """One column of a formatted table: its heading, the text of each row, and whether it is left-aligned."""

    heading: str
    cells: tuple[str, ...]
    left: bool = False


_LEFT = ("task", "method", "measure", "setting", "label", "difference", "requirement")
"""Headings of left-aligned columns."""


def columns(cells: Mapping[str, Sequence[str]]) -> list[Column]:
    """Create columns from texts by heading. Columns of text are left-aligned."""
    return [Column(heading, tuple(texts), heading in _LEFT) for heading, texts in cells.items()]


@dataclass(frozen=True)
class Difference:
    """One row of `differences.csv`: method − reference over pairs of runs of the same task and seed, with its 95 % interval."""

    task: str
    method: str
    reference: str
    measure: str
    pairs: int
    value: Estimate
    label: str


def difference_table(rows: Sequence[Difference], *, digits: int) -> list[Column]:
    """Return the columns of a table of paired differences with their intervals."""
    return columns(
        {
            "task": [row.task for row in rows],
            "difference": [f"{row.method} − {row.reference}" for row in rows],
            "measure": [row.measure for row in rows],
            "value [95 %]": [interval(row.value, digits, signed=True) for row in rows],
            "pairs": [str(row.pairs) for row in rows],
        }
    )


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclass instances of one type as rows, with the field names as header. None and infinite numbers become empty cells.

    An estimate has further columns `low` and `high`, or `FIELD_low` and `FIELD_high` if a row has several estimates. Without
    rows, removes the file, which may exist from an earlier part of the study.
    """
    if not rows:
        return path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([name for name, _ in _cells(rows[0])])
        writer.writerows([_plain(value) for _, value in _cells(row)] for row in rows)
    return None


def _cells(row: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of every column of a row."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    several = sum(isinstance(value, Estimate) for value in values.values()) > 1
    for name, value in values.items():
        if isinstance(value, Estimate):
            prefix = f"{name}_" if several else ""
            yield from ((name, value.value), (f"{prefix}low", value.low), (f"{prefix}high", value.high))
        else:
            yield name, value


def write_page(out: Path, title: str, parts: Sequence[str]) -> None:
    """Write `summary.md`: the title and the non-empty parts."""
    (out / "summary.md").write_text("\n\n".join([f"# {title}", *filter(None, parts)]) + "\n", encoding="utf-8")


def markdown_table(columns: Sequence[Column]) -> str:
    """Format the columns as a Markdown table."""
    lines = [
        "| " + " | ".join(column.heading for column in columns) + " |",
        "|" + "|".join("---" if column.left else "---:" for column in columns) + "|",
    ]
    for cells in zip(*(column.cells for column in columns), strict=True):
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def screen_table(title: str, columns: Sequence[Column]) -> Table:
    """Format the columns as a `rich` table, for the terminal."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column.heading, justify="left" if column.left else "right")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table


_LATEX = {"_": "\\_", "%": "\\%", "&": "\\&", "#": "\\#", "$": "\\$", "{": "\\{", "}": "\\}", "~": "\\textasciitilde{}"}
_LATEX |= {
    "^": "\\textasciicircum{}",
    "\\": "\\textbackslash{}",
    "±": "$\\pm$",
    "−": "$-$",
    "–": "--",
    "×": "$\\times$",
}
_LATEX |= {"σ": "$\\sigma$", "α": "$\\alpha$", "β": "$\\beta$", "γ": "$\\gamma$"}


def latex_table(caption: str, columns: Sequence[Column]) -> str:
    """Format the columns as a LaTeX table, which requires the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells) + " \\\\"

    return "\n".join(
        [
            f"% {caption}",
            f"\\begin{{tabular}}{{{''.join('l' if column.left else 'r' for column in columns)}}}",
            "\\toprule",
            line([column.heading for column in columns]),
            "\\midrule",
            *map(line, zip(*(column.cells for column in columns), strict=True)),
            "\\bottomrule",
            "\\end{tabular}",
        ]
    )


def number(value: float | None, digits: int = 3) -> str:
    """Format a value with `digits` decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def plus_minus(value: float | None, deviation: float | None, digits: int = 3) -> str:
    """Format `value ± deviation`; only the value if `deviation` is None."""
    return number(value, digits) + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def interval(estimate: Estimate, digits: int = 3, *, signed: bool = False) -> str:
    """Format `value [low, high]`; only the value if the interval is infinite, nothing for NaN. `signed`: with explicit plus signs."""
    if np.isnan(estimate.value):
        return ""
    form = f"{'+' if signed else ''}.{digits}f"
    ends = f" [{estimate.low:{form}}, {estimate.high:{form}}]" if estimate.bounded else ""
    return f"{estimate.value:{form}}{ends}"


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and np.isinf(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
