"""`difftori report`: compares any number of runs on one static page, and writes the same numbers as CSV and LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np

from difftori import __version__
from difftori.errors import ConfigError
from difftori.experiments.analyse import OVER, Pair, Section, sections
from difftori.experiments.gather import Gathered, RunResult, data_names, gather
from difftori.experiments.naming import differing
from difftori.experiments.records import RETURN, VALIDATION_ERROR
from difftori.experiments.report_figures import against, learning_curves, over_tasks, profiles
from difftori.experiments.statistics import BOOTSTRAP_COVERAGE, Estimate
from difftori.experiments.tables import Column, interval, latex_table, number, plus_minus, write_csv
from difftori.runs.checkpoint import replace_file
from difftori.runs.figures import svg_element
from difftori.runs.page import inline

_INLINE = 3_000_000
_IMAGES = 24
_SHOWN = {"steps", "settings.updates", "settings.epochs", "eval_episodes", "episodes"}
"""Settings whose differences between tasks have a warning of their own, or are of the data."""
_FILES = ("results.csv", "aggregates.csv", "pairs.csv")


@dataclass(frozen=True)
class Report:
    """A written report: its page, and the tables of each measure, by caption."""

    page: Path
    tables: list[dict[str, list[Column]]]


@dataclass(frozen=True)
class RunLine:
    """One row of `runs.csv`: a run, finished or not, and the protocol of its result."""

    task: str
    method: str
    seed: int
    finished: bool
    measure: str | None
    value: float | None
    episodes: int | None
    rule: str
    budget: str
    seconds: float | None
    hardware: str
    versions: str
    command: str
    place: str


@dataclass(frozen=True)
class EstimateLine:
    """One row of `results.csv` (by task), `aggregates.csv` (over tasks) or `pairs.csv`."""

    measure: str
    task: str
    method: str
    reference: str
    statistic: str
    runs: int
    value: Estimate


def write_report(
    places: Sequence[Path],
    out: Path,
    *,
    title: str | None = None,
    reference: str | None = None,
    evaluation: Literal["training", "latest"] = "training",
) -> Report:
    """Write `out/report.html`, `runs.csv`, `results.csv`, `aggregates.csv`, `pairs.csv` and `tables.tex`.

    `reference`: the method to compare the others with (default: compare every pair). `evaluation`: as in `gather`. Raises
    ConfigError without runs, or for an unknown reference.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError([f"out: {out} is a file. Fix: give a directory"])
    found = gather(places, evaluation)
    parts = sections(found.runs, reference)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "runs.csv", [_run_line(run) for run in found.runs])
    lines = [_lines(part) for part in parts]
    rows = {name: [row for by_file in lines for row in by_file[name]] for name in _FILES}
    for name, own in rows.items():
        write_csv(out / name, own)
    shown = [_tables(part) for part in parts]
    replace_file(out / "tables.tex", _latex(shown).encode())
    page = out / "report.html"
    name = title or ", ".join(str(place) for place in places)
    replace_file(page, _render(name, found, parts, shown, out, [name for name in _FILES if rows[name]]).encode())
    return Report(page, shown)


def _render(
    title: str,
    found: Gathered,
    parts: Sequence[Section],
    tables: list[dict[str, list[Column]]],
    out: Path,
    files: list[str],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("difftori.experiments", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    methods = sorted({run.method for run in found.runs})
    curves = [learning_curves(found.runs, name, methods) for name in (RETURN, VALIDATION_ERROR)]
    drawn = []
    for part, by_caption in zip(parts, tables, strict=True):
        figures = [over_tasks(part), profiles(part)] if any(row.runs > 1 for row in part.over) else []
        drawn.append((part, by_caption, [svg_element(f) for f in (*figures, against(part)) if f is not None]))
    return environment.get_template("report.html.j2").render(
        title=title,
        version=__version__,
        total=len(found.runs),
        finished=sum(run.finished for run in found.runs),
        warnings=_warnings(found, parts),
        unfinished=[run for run in found.runs if not run.finished],
        left_out=found.left_out,
        sections=drawn,
        curves=[svg_element(figure) for figure in curves if figure is not None],
        images=_images(found.runs, out),
        protocol=_protocol(found.runs),
        commands=[(f"{run.method}, {run.task}, seed {run.seed}", run.command) for run in found.runs],
        files=["runs.csv", *files, "tables.tex"],
    )


def _warnings(found: Gathered, parts: Sequence[Section]) -> list[str]:
    """Return warnings about runs that differ in more than their methods."""
    warnings = [
        f"{method} has another {name.removeprefix('settings.')} on each of several tasks. See the commands."
        for method in sorted({run.method for run in found.runs})
        for name in sorted(differing([run.config for run in found.runs if run.method == method]) - _SHOWN)
    ]
    counted = [run for run in found.runs if run.config.get("settings.updates") is None]
    for name, what in (
        ("steps", "environment steps"),
        ("settings.updates", "updates"),
        ("settings.epochs", "epochs"),
        ("eval_episodes", "episodes"),
    ):
        runs = counted if name == "settings.epochs" else found.runs  # a run with `updates` ignores its epochs
        values = {int(run.config[name]) for run in runs if run.config.get(name) is not None}
        if len(values) > 1:
            warnings.append(f"Runs differ in {what}: {', '.join(map(str, sorted(values)))}. See the protocol.")
    made = (
        {run.updates for run in found.runs if run.updates is not None and "policy" in run.config} if counted else set()
    )
    if len(made) > 1:
        warnings.append(f"Policies were trained with between {min(made)} and {max(made)} updates. See the protocol.")
    agents = [run for run in found.runs if "agent" in run.config]
    for name in ("settings.preset", "settings.updates_per_step", "action_repeat", "render"):
        values = {str(run.config[name]) for run in agents if run.config.get(name) is not None}
        if len(values) > 1:
            what = name.removeprefix("settings.").replace("_", " ")
            warnings.append(f"Agents differ in {what}: {', '.join(sorted(values))}. See the protocol.")
    for task, method in sorted({(run.task, run.method) for run in found.runs}):
        names = set(data_names([run for run in found.runs if (run.task, run.method) == (task, method)]))
        if len(names) > 1:
            warnings.append(f"{method} on {task}: seeds were trained on different data: {', '.join(sorted(names))}.")
    rules = sorted({run.rule for run in found.runs if run.finished})
    if len(rules) > 1:
        warnings.append(f"Runs differ in the evaluated weights: {'; '.join(rules)}.")
    for part in parts:
        seeds = {cell.seeds for cell in part.cells}
        if len(seeds) > 1:
            warnings.append(
                f"{part.measure.name}: the number of seeds per task is between {min(seeds)} and {max(seeds)}."
            )
        apart = [task for task in part.tasks if task not in part.common]
        if apart and len(part.methods) > 1:
            warnings.append(
                f"{part.measure.name}: results over tasks exclude {', '.join(apart)}, which some methods do not have."
            )
        sets = {tuple(sorted(run.seed for run in found.runs if run.method == m)) for m in part.methods}
        if len(seeds) == 1 and len(sets) > 1:
            warnings.append(f"{part.measure.name}: methods have runs with different seeds.")
        if part.measure.full is None and len(part.tasks) > 1:
            warnings.append(f"{part.measure.name} has no common scale over tasks, so tasks are not averaged.")
        even = [pair for pair in part.pairs if pair.runs > 1 and pair.difference.high - pair.difference.low < 1e-9]
        if even:
            warnings.append(
                f"{part.measure.name}: {len(even)} differences are equal on all seeds, so their intervals have no width, which is "
                "no certainty: more episodes would tell them apart."
            )
        few = min((cell.seeds for cell in part.cells if cell.seeds > 1), default=0)
        if (part.over or part.pairs) and few in BOOTSTRAP_COVERAGE:
            warnings.append(
                f"{part.measure.name}: with {few} seeds, the bootstrap's 95 % intervals are too narrow. On one task they contain "
                f"the mean of normally distributed results in {100 * BOOTSTRAP_COVERAGE[few]:.0f} % of cases."
            )
    return warnings


def _tables(part: Section) -> dict[str, list[Column]]:
    """Return the tables by caption: by task, over tasks, and pairs of methods."""
    cells = {(cell.task, cell.method): cell for cell in part.cells}

    def shown(task: str, method: str) -> str:
        cell = cells.get((task, method))
        if cell is None:
            return "–"
        return f"{plus_minus(cell.mean.value, cell.std, _digits(cell.mean.value))} ({cell.seeds})"

    by_task = [
        Column("task", part.tasks, left=True),
        *(Column(method, tuple(shown(task, method) for task in part.tasks)) for method in part.methods),
    ]
    by_method = [
        Column("method", part.methods, left=True),
        *(Column(task, tuple(shown(task, method) for method in part.methods)) for task in part.tasks),
    ]
    narrow = by_task if len(part.methods) < len(part.tasks) else by_method
    found = {f"{_name(part)}, mean ± standard deviation over seeds (number of seeds)": narrow}
    if part.over:
        scale = "" if part.measure.full == 1 else f", of {part.measure.full:g}"
        found[f"over {len(part.common)} task(s){scale}, 95 % stratified bootstrap over seeds"] = [
            Column("method", tuple(row.method for row in part.over), left=True),
            *(Column(name, tuple(_bounded(row.statistics[name]) for row in part.over)) for name in OVER),
            Column("runs", tuple(str(row.runs) for row in part.over)),
        ]
    if part.pairs:
        single = any(pair.episodes for pair in part.pairs)
        caption = "pairs of methods, over runs of the same task, seed and episodes"
        if single:
            caption += "; with one run each, over their common episodes (without the variation between trainings)"
        found[caption] = [
            Column("task", tuple(pair.task or "all tasks" for pair in part.pairs), left=True),
            Column("difference", tuple(f"{pair.method} − {pair.reference}" for pair in part.pairs), left=True),
            Column("pairs", tuple(_pairs_counted(pair) for pair in part.pairs)),
            Column("value", tuple(_bounded(pair.difference, signed=True) for pair in part.pairs)),
            Column(
                "probability of improvement",
                tuple("–" if pair.better is None else _bounded(pair.better) for pair in part.pairs),
            ),
        ]
    return found


def _pairs_counted(pair: Pair) -> str:
    return f"{pair.runs} ({pair.episodes} episodes)" if pair.episodes else str(pair.runs)


def _name(part: Section) -> str:
    """Return the name of a measure with its scale, which distinguishes the returns of environment families."""
    full = part.measure.full
    return part.measure.name if full in (None, 1) else f"{part.measure.name} of {full:g}"


def _bounded(estimate: Estimate, *, signed: bool = False) -> str:
    text = interval(estimate, _digits(estimate.value), signed=signed)
    return text if estimate.bounded else f"{text} (one seed)"


def _digits(value: float) -> int:
    """Return the number of decimals for about three significant digits."""
    return 3 if abs(value) < 2 else 1 if abs(value) < 100 else 0


def _latex(tables: Sequence[dict[str, list[Column]]]) -> str:
    """Format all tables as LaTeX."""
    parts = ["% Written by difftori report. Requires \\usepackage{booktabs}."]
    parts += ["\n" + latex_table(caption, columns) for by_caption in tables for caption, columns in by_caption.items()]
    return "\n".join(parts) + "\n"


def _protocol(runs: Sequence[RunResult]) -> list[Column]:
    """Return one row for each method with its evaluation protocol. Values that differ between its runs are listed."""
    methods = sorted({run.method for run in runs})

    def of(take) -> tuple[str, ...]:
        cells = []
        for method in methods:
            values = [take(run) for run in runs if run.method == method]
            cells.append("; ".join(dict.fromkeys(str(value) for value in values if value not in (None, ""))) or "–")
        return tuple(cells)

    def median(method: str) -> str:
        spent = [run.seconds for run in runs if run.method == method and run.seconds is not None]
        return number(float(np.median(spent)), 0) if spent else "–"

    return [
        Column("method", tuple(methods), left=True),
        Column("runs, finished", tuple(_count(runs, method) for method in methods)),
        Column("seeds", tuple(_seeds(runs, method) for method in methods)),
        Column("evaluation episodes", of(lambda run: run.config.get("eval_episodes"))),
        Column("weights", of(lambda run: run.rule), left=True),
        Column("budget", of(_budget), left=True),
        Column("median s", tuple(median(method) for method in methods)),
        Column("hardware", of(lambda run: run.hardware), left=True),
        Column("versions", tuple(_versions([r for r in runs if r.method == m]) for m in methods), left=True),
    ]


def _count(runs: Sequence[RunResult], method: str) -> str:
    own = [run.finished for run in runs if run.method == method]
    return f"{len(own)}, {sum(own)}"


def _seeds(runs: Sequence[RunResult], method: str) -> str:
    return " ".join(map(str, sorted({run.seed for run in runs if run.method == method})))


_OF_AGENTS = ("settings.preset", "settings.updates_per_step", "action_repeat")
"""Settings of agents that belong to their budget."""


def _budget(run: RunResult) -> str:
    steps, updates = run.config.get("steps"), run.config.get("settings.updates")
    if steps is not None:
        found = [f"{steps} environment steps"]
        found += [f"{name} {value}" for name in _OF_AGENTS if (value := run.config.get(name)) is not None]
        return ", ".join(found).replace("settings.", "").replace("updates_per_step", "updates per step")
    if updates is not None:
        return f"{updates} updates"
    epochs = f"{run.config.get('settings.epochs')} epochs"
    return epochs if run.updates is None else f"{epochs}, {run.updates} updates"


def _versions(runs: Sequence[RunResult]) -> str:
    """Format the software versions of runs. If runs differ, all versions are listed."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in run.versions.items():
            found.setdefault(name, {})[value[:12]] = None
    return ", ".join(f"{name} {' or '.join(values)}" for name, values in found.items())


def _run_line(run: RunResult) -> RunLine:
    measure = next(iter(run.outcomes), None)
    return RunLine(
        task=run.task,
        method=run.method,
        seed=run.seed,
        finished=run.finished,
        measure=None if measure is None else measure.name,
        value=None if measure is None else run.outcomes[measure],
        episodes=run.config.get("eval_episodes"),
        rule=run.rule,
        budget=_budget(run),
        seconds=run.seconds,
        hardware=run.hardware,
        versions=_versions([run]),
        command=run.command,
        place=str(run.place),
    )


def _lines(part: Section) -> dict[str, list[EstimateLine]]:
    """Return the statistics of a measure as rows, by the name of their file."""
    name, by_task = _name(part), []
    for cell in part.cells:
        found = {"mean over seeds (Student)": cell.mean, f"of {cell.episodes} episodes (Wilson)": cell.pooled}
        for statistic, value in found.items():
            if value is not None:
                by_task.append(EstimateLine(name, cell.task, cell.method, "", statistic, cell.seeds, value))
    over = [
        EstimateLine(name, f"{row.tasks} tasks", row.method, "", statistic, row.runs, value)
        for row in part.over
        for statistic, value in row.statistics.items()
    ]
    pairs = [
        EstimateLine(name, pair.task or "all tasks", pair.method, pair.reference, statistic, pair.runs, value)
        for pair in part.pairs
        for statistic, value in (
            (f"paired difference{f' over {pair.episodes} episodes' if pair.episodes else ''}", pair.difference),
            ("probability of improvement", pair.better),
        )
        if value is not None
    ]
    return dict(zip(_FILES, (by_task, over, pairs), strict=True))


def _images(runs: Sequence[RunResult], out: Path) -> list[tuple[str, str]]:
    """Return images and videos of one seed of each method and task, embedded in the page, or as links if they are large."""
    found: dict[tuple[str, str, str], tuple[str, str]] = {}
    for run in runs:
        for image in run.images:
            caption = f"{run.method}, {run.task}, seed {run.seed}: {image.stem}"
            address = inline(image) if image.stat().st_size <= _INLINE else image.resolve().as_uri()
            found.setdefault((run.method, run.task, image.stem), (caption, address))
    return list(found.values())[:_IMAGES]
