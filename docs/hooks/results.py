"""Puts committed results into the pages, or says that there are none: pages never hold copies of numbers.

A mark `<!-- results: PATH -->` in a page becomes: for a Markdown file, the file without its title; for a folder, every
.svg in it; for one .svg, that figure; for `PATH.csv | name, other=label`, these columns of the table, with another heading where one is given.
"""

import csv
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
FOLDERS = ("results", "benchmarks/results")
ABSENT = "*There are no results of this kind in the repository yet.*"


def on_files(files, config):
    """Publish the pictures, which lie outside docs/."""
    for folder in FOLDERS:
        for picture in sorted((ROOT / folder).rglob("*.svg")):
            uri = picture.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill the marks in."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"<!-- results: ([^|>]+?)(?: \| ([^>]+?))? -->", lambda m: _fill(m[1], m[2], up) or ABSENT, markdown)


def _fill(name, columns, up):
    path = ROOT / name
    if path.is_dir():
        names = [picture.relative_to(ROOT).as_posix() for picture in sorted(path.glob("*.svg"))]
        return "\n\n".join(f"![{Path(n).stem.replace('_', ' ')}]({up}{n})" for n in names)
    if not path.exists():
        return ""
    if path.suffix == ".svg":
        return f"![{path.stem.replace('_', ' ')}]({up}{name})"
    if columns is None:
        return re.sub(r"\A# .*\n", "", path.read_text(encoding="utf-8"))
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
