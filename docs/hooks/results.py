"""Inserts committed results and command output into the pages, so that no page holds a copy of them.

| mark | becomes |
|---|---|
| `<!-- results: FILE.md -->` | the file without its title |
| `<!-- results: FOLDER -->`, `<!-- results: FILE.svg -->` or `.gif` | the figures of the folder, or that figure or film |
| `<!-- results: FILE.csv \\| name, other=label -->` | these columns of the table, `other` under the heading `label` |
| `<!-- output: difftori … -->` | the command with its output |

A result that does not exist is replaced by a sentence that says so.
"""

import csv
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

from mkdocs.structure.files import File

from difftori.cli import main

ROOT = Path(__file__).parents[2]
FOLDERS = ("results", "benchmarks/results")
FIGURES = (".svg", ".gif")
ABSENT = "*There are no results of this kind in the repository yet.*"


def on_files(files, config):
    """Publish the figures and films, which are outside docs/."""
    for folder in FOLDERS:
        for figure in sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in FIGURES):
            uri = figure.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace the marks."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"<!-- output: difftori (.+?) -->", lambda m: _output(m[1].split()), markdown)
    return re.sub(r"<!-- results: ([^|>]+?)(?: \| ([^>]+?))? -->", lambda m: _fill(m[1], m[2], up) or ABSENT, markdown)


def _output(words):
    with redirect_stdout(StringIO()) as text, redirect_stderr(text), suppress(SystemExit):
        main(words)
    return f"```console\n$ difftori {' '.join(words)}\n{text.getvalue().rstrip()}\n```"


def _fill(name, columns, up):
    path = ROOT / name
    if path.is_dir():
        names = [figure.relative_to(ROOT).as_posix() for figure in sorted(path.glob("*.svg"))]
        return "\n\n".join(f"![{Path(n).stem.replace('_', ' ')}]({up}{n})" for n in names)
    if not path.exists():
        return ""
    if path.suffix in FIGURES:
        return f"![{path.stem.replace('_', ' ')}]({up}{name})"
    if columns is None:
        text = re.sub(r"\A# .*\n", "", path.read_text(encoding="utf-8"))
        return re.sub(r"\]\(([\w-]+\.svg)\)", rf"]({up}{Path(name).parent.as_posix()}/\1)", text)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    pairs = [column.strip().partition("=") for column in columns.split(",")]
    lines = [[heading or column for column, _, heading in pairs], ["---"] * len(pairs)]
    lines += [[_short(row[column]) for column, _, _ in pairs] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(text):
    try:
        value = float(text)
    except ValueError:
        return text
    return "" if value != value else f"{value:.4g}"
