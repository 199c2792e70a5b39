"""Tables of studies and reports: as CSV, Markdown and LaTeX, and on the screen."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from difftori.experiments.statistics import Estimate


@dataclass(frozen=True)
class Column:
    """One column of a table for people: its heading and the text of each line."""

    heading: str
    cells: tuple[str, ...]
    left: bool = False


_LEFT = ("task", "method", "measure", "setting", "label", "difference")
"""Headings of columns of text."""


def columns(cells: Mapping[str, Sequence[str]]) -> list[Column]:
    """Columns by heading, text to the left."""
    return [Column(heading, tuple(texts), heading in _LEFT) for heading, texts in cells.items()]


@dataclass(frozen=True)
class Difference:
    """One line of `differences.csv`: method − reference over pairs of runs of the same task and seed, with its 95 % interval.

    `low` and `high` are None for a single pair.
    """

    task: str
    method: str
    reference: str
    measure: str
    pairs: int
    value: float
    low: float | None
    high: float | None
    label: str

    @classmethod
    def of(
        cls, task: str, method: str, reference: str, measure: str, pairs: int, estimate: Estimate, label: str
    ) -> "Difference":
        """The line of an estimate."""
        low, high = finite(estimate.low), finite(estimate.high)
        return cls(task, method, reference, measure, pairs, estimate.value, low, high, label)


def difference_table(rows: Sequence[Difference], *, digits: int) -> list[Column]:
    """Paired differences with their intervals."""
    return columns(
        {
            "task": [row.task for row in rows],
            "difference": [f"{row.method} − {row.reference}" for row in rows],
            "measure": [row.measure for row in rows],
            "value [95 %]": [bounded(row.value, row.low, row.high, digits, signed=True) for row in rows],
            "pairs": [str(row.pairs) for row in rows],
        }
    )


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclass instances of one type, one line each, with the fields as header; None becomes empty.

    Without rows, remove the file that an earlier part of the study may have left.
    """
    if not rows:
        return path.unlink(missing_ok=True)
    names = [field.name for field in fields(rows[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([_plain(getattr(row, name)) for name in names])
    return None


def write_page(out: Path, title: str, parts: Sequence[str]) -> None:
    """Writes `summary.md`: the title and the parts that are not empty."""
    (out / "summary.md").write_text("\n\n".join([f"# {title}", *filter(None, parts)]) + "\n", encoding="utf-8")


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
    """The columns as a LaTeX table, for the package booktabs."""

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
    """The value to `digits` decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def plus_minus(value: float | None, deviation: float | None, digits: int = 3) -> str:
    """`value ± deviation`, the deviation left out where there is none."""
    return number(value, digits) + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def interval(estimate: Estimate, digits: int = 3, *, signed: bool = False) -> str:
    """`value [low, high]`, with signs if asked."""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def bounded(value: float, low: float | None, high: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """`value [low, high]`, or the value alone without an interval."""
    if low is None or high is None:
        return f"{value:{'+' if signed else ''}.{digits}f}"
    return interval(Estimate(value, low, high), digits, signed=signed)


def finite(value: float) -> float | None:
    """The value, or None for an end of an interval that is infinite because one value has no spread."""
    return float(value) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
