"""The report of a run: one static page with its settings and results. It needs no network and runs no script."""

import base64
import json
from pathlib import Path

import jinja2

from difftori.errors import DataError
from difftori.runs.checkpoint import replace_file
from difftori.runs.figures import RESULTS, metric_figures, svg_element
from difftori.runs.records import read_config, read_metrics, read_summary
from difftori.types import Metrics

MEDIA = {".svg": "image/svg+xml", ".png": "image/png", ".gif": "image/gif"}


def write_report(path: Path) -> Path:
    """Rewrite `report.html` of a finished run, for example after adding files to `media/`."""
    target = path / "report.html"
    replace_file(target, render(path, read_summary(path)).encode())
    return target


def render(path: Path, summary: Metrics) -> str:
    """Return the page: summary, metrics over the steps, media, configuration, versions, commands. Results are first."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("difftori.runs", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    config = read_config(path) if (path / "config.yaml").exists() else {}
    name = config.get("agent") or config.get("policy")
    figures = metric_figures(read_metrics(path), "environment steps" if "agent" in config else "updates")
    first = sorted(summary, key=lambda metric: metric.rpartition("/")[2].removeprefix("mean_") not in RESULTS)
    return environment.get_template("page.html.j2").render(
        title=f"{name} on {config.get('env')}, seed {config.get('seed')}" if name else path.resolve().name,
        place=path.resolve(),
        summary={metric: f"{summary[metric]:.6g}" for metric in first},
        curves={heading: svg_element(figure) for heading, figure in figures.items()},
        media=[(p.stem, inline(p)) for p in sorted((path / "media").glob("*")) if p.suffix in MEDIA],
        config=_text(path / "config.yaml"),
        versions=_versions(path / "versions.json"),
        commands=_text(path / "command.txt"),
    )


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
