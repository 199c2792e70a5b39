"""The report of a run: one static page with its settings and results. It needs no network and runs no script."""

import base64
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2

from difftori.errors import DataError
from difftori.runs.checkpoint import replace_file
from difftori.runs.figures import RESULTS, metric_figures, svg_element
from difftori.runs.process import versions, wait_for
from difftori.runs.records import is_finished, read_config, read_metrics, read_summary
from difftori.types import Metrics

MEDIA = {".svg": "image/svg+xml", ".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}

_log = logging.getLogger(__name__)


def write_report(path: Path) -> Path:
    """Rewrite `report.html` of a finished run, for example after adding files to `media/`."""
    target = path / "report.html"
    replace_file(target, render(path, read_summary(path)).encode())
    return target


def keep_evaluation(
    path: Path, metrics: Metrics, episodes: Mapping[str, Sequence[float]], settings: Mapping[str, object]
) -> None:
    """Append an evaluation after training to the run's `eval.json`, and show it on its page.

    `episodes`: the results of each episode, in columns. `settings`: weights, device, and so on. A directory that cannot be
    written is only warned of, because the result is printed anyway.
    """
    target = path / "eval.json"
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        **settings,
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "episodes": {name: list(values) for name, values in episodes.items()},
        "versions": versions(str(settings.get("device", "cpu"))),
    }
    try:
        with (path / "eval.lock").open("a") as lock:  # other processes may evaluate the same run
            wait_for(lock)
            replace_file(target, (json.dumps([*read_evaluations(path), entry], indent=1) + "\n").encode())
            if is_finished(path):
                write_report(path)
    except OSError as error:
        _log.warning("%s: the evaluation cannot be kept (%s)", target, error)


def read_evaluations(path: Path) -> list[dict]:
    """Read the evaluations of a run after its training. Raises DataError if the file is damaged."""
    source = path / "eval.json"
    try:
        return list(json.loads(source.read_bytes())) if source.exists() else []
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{source}: unreadable ({error}). Fix: move it away") from error


def evaluations_since_training(path: Path) -> list[dict]:
    """Return the evaluations of the run's present weights: those since the end of its training, which may have been extended.

    Raises DataError if a file is damaged.
    """
    rows = read_metrics(path)
    ended = int(rows[-1].get("time", 0)) if rows else 0
    try:
        times = [(entry, datetime.strptime(entry["time"], "%Y-%m-%dT%H:%M:%S%z")) for entry in read_evaluations(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path / 'eval.json'}: not a list of evaluations ({error!r}). Fix: move it away") from error
    return [entry for entry, made in times if made.timestamp() >= ended]


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
        evaluations=[_shown(entry) for entry in reversed(read_evaluations(path))],
        media=[(p.stem, MEDIA[p.suffix], inline(p)) for p in sorted((path / "media").glob("*")) if p.suffix in MEDIA],
        config=_text(path / "config.yaml"),
        versions=_versions(path / "versions.json"),
        commands=_text(path / "command.txt"),
    )


def inline(image: Path) -> str:
    """Encode an image as a data URL. An SVG in an <img> element cannot run scripts."""
    content = base64.b64encode(image.read_bytes()).decode()
    return f"data:{MEDIA[image.suffix]};base64,{content}"


def _shown(entry: dict) -> tuple[str, dict[str, str]]:
    """Return the heading and the numbers of an evaluation."""
    own = {name: entry[name] for name in ("weights", "device") if entry.get(name)}
    settings = [
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in {**own, **entry.get("changes", {})}.items()
    ]
    numbers = {name: "" if value is None else f"{value:.6g}" for name, value in entry["metrics"].items()}
    return ", ".join([str(entry["time"]), *settings]), numbers


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _versions(path: Path) -> dict[str, str]:
    try:
        return {name: str(value) for name, value in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: unreadable ({error}); it is written when a run starts. Fix: restore the file"
        ) from error
