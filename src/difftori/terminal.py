"""Terminal output of the command line: tables, help, error messages, progress. `rich` is imported when something is printed."""

import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table whose columns are the keys, in order of appearance. Floats have six digits; None is left empty."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), Table()
    names = list(dict.fromkeys(name for row in rows for name in row))
    for index, name in enumerate(names):
        table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(name))) for name in names))
    console.print(Text(title, style="bold"))
    console.print(table)


def best_and_last(summary: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows for `print_table` from a run's summary; results of the best and the last weights are two columns, if both exist."""
    if "best/validation_error" not in summary:
        return [{"": name, "value": value} for name, value in summary.items()]
    plain = [{"": name, "best": value, "last": value} for name, value in summary.items() if "/" not in name]
    names = dict.fromkeys(name.partition("/")[2] for name in summary if "/" in name)
    return plain + [{"": n, "best": summary.get(f"best/{n}"), "last": summary.get(f"last/{n}")} for n in names]


def paragraphs(text: str) -> str:
    """Wrap a text to the width of the terminal, at most 100 characters. Paragraphs are separated by empty lines."""
    return "\n\n".join("\n".join(_wrapped(" ".join(part.split()), 0)) for part in text.strip().split("\n\n"))


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a docstring in one line."""
    return re.split(r"(?<=\.)\s(?=[A-Z`])", " ".join((text or "").split()), maxsplit=1)[0]


def option_list(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return the title, and each option with its description beside it, or below if the option is long."""
    lines, column = [f"{title}:"], 26
    for option, text in rows:
        head, body = f"  {option}", _wrapped(text, column)
        if len(head) + 2 > column or not body:
            lines.append(head)
        else:
            lines.append(f"{head:<{column}}{body.pop(0).lstrip()}")
        lines += body
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    width = max(60, min(shutil.get_terminal_size().columns, 100))
    blank = " " * indent
    return textwrap.wrap(
        text, width, initial_indent=blank, subsequent_indent=blank, break_long_words=False, break_on_hyphens=False
    )


def print_errors(messages: Sequence[str]) -> None:
    """Print each message on stderr, prefixed with `error: `."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    for message in messages:
        console.print(Text("error: ", style="bold red") + Text(message))


@contextmanager
def status(text: str, *, shown: bool = True) -> Iterator[None]:
    """Show a text beside a spinner on stderr, in a terminal."""
    from rich.console import Console

    with Console(stderr=True, quiet=not shown).status(text):
        yield


@contextmanager
def run_progress(
    total: int, finished: int, *, shown: bool = True
) -> Iterator[tuple[Callable[[str], None], Callable[[object], None]]]:
    """Show a progress bar over runs on stderr. Yields a function that prints a line above it and one to call after each finished run."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    columns = (TextColumn("runs"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=not shown)) as bar:
        line = bar.add_task("runs", total=total, completed=finished)
        yield lambda text: bar.console.print(Text(text), soft_wrap=True), lambda _: bar.advance(line)


@contextmanager
def count_progress(title: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar with the time left on stderr. Yields a function of the numbers of finished and of all items."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        line = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
