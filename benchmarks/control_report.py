"""Tables and the figure of `difftori bench control`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.control_entries import ENTRIES
from benchmarks.measuring import quartiles
from benchmarks.records import write_csv, write_figure

PARTS = ("cold", "warm", "gradient")


@dataclass(frozen=True)
class Sample:
    """One timed call: milliseconds for the whole batch, scaled if fewer rows were solved."""

    cell: str
    entry: str
    part: str
    repeat: int
    ms: float


@dataclass(frozen=True)
class Line:
    """One entry on one cell.

    Times in milliseconds for the whole batch: median and quartiles. `rows`: number of rows that were solved and timed.
    `…_ratio`: the reference entry's median divided by this one's. `cost` (mean over rows), `violation` (largest) and
    `iterations` are those of the cold solve, `warm_…` those over the solves of the closed loop. `solved`: share of rows for
    which the solver reports success. `gradient_error`: relative to the gradient of the reference entry, if both plans are
    the same.
    """

    problem: str
    horizon: int
    batch: int
    entry: str
    rows: int
    first_call_ms: float
    cold_ms: float
    cold_q1: float
    cold_q3: float
    warm_ms: float
    warm_q1: float
    warm_q3: float
    gradient_ms: float
    gradient_q1: float
    gradient_q3: float
    cold_ratio: float
    warm_ratio: float
    gradient_ratio: float
    cost: float
    violation: float
    iterations: float
    solved: float
    warm_cost: float
    warm_violation: float
    warm_iterations: float
    warm_solved: float
    gradient_error: float


def summarise(samples: Sequence[Sample], reference: Line | None) -> dict[str, float]:
    """Median, quartiles and ratio to `reference` (None: this entry is the reference) of each part, named as fields of `Line`."""
    times: dict[str, float] = {}
    for part in PARTS:
        low, middle, high = quartiles([sample.ms for sample in samples if sample.part == part])
        times |= {f"{part}_q1": low, f"{part}_ms": middle, f"{part}_q3": high}
        times[f"{part}_ratio"] = 1.0 if reference is None else getattr(reference, f"{part}_ms") / middle
    return times


def write_raw(path: Path, samples: Sequence[Sample]) -> None:
    """Write every timed call."""
    write_csv(path, [asdict(sample) | {"ms": f"{sample.ms:.4f}"} for sample in samples])


def table(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The summary as text for the screen. The CSV also has quartiles and ratios."""
    return [
        {
            "problem": f"{line.problem} B={line.batch}",
            "entry": line.entry,
            **{f"{part} ms": f"{getattr(line, f'{part}_ms'):.3g}" for part in PARTS},
            "cost": f"{line.cost:.2f}",
            "violation": f"{line.violation:.0e}",
        }
        for line in lines
    ]


def write_plots(path: Path, lines: Sequence[Line]) -> None:
    """Plot the three times of every entry as bars with quartiles, for each cell."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys((line.problem, line.batch) for line in lines))
    figure = Figure(figsize=(10, 0.8 + 2.4 * len(cells)), layout="constrained")
    axes = figure.subplots(len(cells), 1, squeeze=False)[:, 0]
    order = [entry.name for entry in ENTRIES]
    for axis, (problem, batch) in zip(axes, cells, strict=True):
        own = [line for line in lines if (line.problem, line.batch) == (problem, batch)]
        width = 0.8 / len(own)
        for index, line in enumerate(own):
            middles = [getattr(line, f"{part}_ms") for part in PARTS]
            below = [m - getattr(line, f"{part}_q1") for m, part in zip(middles, PARTS, strict=True)]
            above = [getattr(line, f"{part}_q3") - m for m, part in zip(middles, PARTS, strict=True)]
            places = [i + width * (index - (len(own) - 1) / 2) for i in range(len(PARTS))]
            label = f"{line.entry}: cost {line.cost:.2f}"
            color = f"C{order.index(line.entry) % 10}"
            axis.bar(places, middles, 0.9 * width, yerr=[below, above], color=color, label=label)
        axis.set(yscale="log", ylabel="ms", title=f"{problem}, {batch} {'row' if batch == 1 else 'rows'}")
        axis.set_xticks(range(len(PARTS)), ["cold solve", "warm closed-loop step", "solve and gradient"])
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_figure(path, figure)
