"""The report of a run: one static page with its settings and results. It needs no network and runs no script."""

import base64
import io
import json
import re
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from difftori.errors import DataError
from difftori.runs.checkpoint import replace_file
from difftori.runs.records import read_metrics, read_summary
from difftori.types import Metrics

MEDIA = {".svg": "image/svg+xml", ".png": "image/png", ".gif": "image/gif"}
_COLUMNS = 3


def write_report(path: Path) -> Path:
    """Rewrite `report.html` of a finished run, for example after adding files to `media/`."""
    target = path / "report.html"
    replace_file(target, render(path, read_summary(path)).encode())
    return target


def render(path: Path, summary: Metrics) -> str:
    """Return the page: summary, learning curves, media, configuration, versions, commands."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("difftori.runs", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        title=path.resolve().name,
        summary={name: f"{value:.6g}" for name, value in summary.items()},
        curves=curves(read_metrics(path)),
        media=[(p.stem, inline(p)) for p in sorted((path / "media").glob("*")) if p.suffix in MEDIA],
        config=_text(path / "config.yaml"),
        versions=_versions(path / "versions.json"),
        commands=_text(path / "command.txt"),
    )


def curves(rows: list[dict]) -> str:
    """Plot each logged metric over the step, as one SVG element. Returns "" if there are no metrics."""
    names = sorted({name for row in rows for name, value in row.items() if type(value) in (int, float)})
    names = [name for name in names if name not in ("step", "time", "epoch")]
    if not names:
        return ""
    height = -(-len(names) // _COLUMNS)
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(4 * _COLUMNS, 2.4 * height))
        figure.subplots_adjust(0.05, 0.25 / height, 0.99, 1 - 0.2 / height, wspace=0.2, hspace=0.35)
        for index, name in enumerate(names, start=1):
            axes = figure.add_subplot(height, _COLUMNS, index)
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, linewidth=1)
            if len(points) > 1 and min(value for _, value in points) > 0:
                axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # plain text, because mathematical labels take a second to render
            axes.yaxis.set_minor_formatter("")
            axes.set_title(name)
            axes.grid(alpha=0.3)
        return svg_element(figure)


def svg_element(figure: Figure) -> str:
    """Convert a figure to a single <svg> element, without XML declaration, document type and metadata with URLs."""
    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "difftori"}):
        FigureCanvasSVG(figure).print_svg(drawing, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", drawing.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :]


def inline(image: Path) -> str:
    """Encode an image as a data URL. An SVG in an <img> element cannot run scripts."""
    content = base64.b64encode(image.read_bytes()).decode()
    return f"data:{MEDIA[image.suffix]};base64,{content}"


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _versions(path: Path) -> dict[str, str]:
    try:
        return {name: str(value) for name, value in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: unreadable ({error}); it is written when a run starts. Fix: restore the file"
        ) from error
