"""Compare this library's planners with Theseus and mpc.pytorch: time, memory, objective, and accuracy of the gradient.

The entries of a cell run interleaved: each repeat runs all of them once in rotating order. The results are medians and
quartiles, and ratios against the first entry: Theseus with the release's settings, or mpc.pytorch. Times are measured in
float32, on `threads` threads, and the backward pass reaches the encoded states AND every parameter of the networks. Quality
is measured once for each entry, in float64 (see `quality`): the objective reached, compared with the end of a converged solve
from there, and the cosine and relative error of the gradient against one that finite differences confirm.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from benchmarks import solver_report as report
from benchmarks.baselines import require_baselines
from benchmarks.measuring import as_in_runs, progress_bar
from benchmarks.records import RESULTS, write_record
from benchmarks.solver_entries import Cell, Entry, Setup, entries
from benchmarks.solver_problems import Start
from benchmarks.solver_quality import Quality, measure_quality
from benchmarks.solver_timing import Sample, peak_megabytes, time_cell


class Config(BaseModel):
    """Entries, problems and settings to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problems: tuple[Literal["latent", "imitation", "pendulum"], ...] = ("latent", "imitation", "pendulum")
    """Problems to solve: planning in a fitted latent model, refining action chunks, swinging up a pendulum."""
    horizons: tuple[PositiveInt, ...] = (1, 5)
    """Horizons of the latent problem. The chunk has 16 variables, the pendulum 20 steps."""
    batches: tuple[PositiveInt, ...] = (1, 32, 256)
    """Numbers of rows of the latent problem."""
    repeats: PositiveInt = 7
    """Number of interleaved repeats of each cell."""
    seconds: float = 120.0
    """Time limit of a cell in seconds. After it, no further repeat begins, once there are three."""
    rows: PositiveInt = 32
    """Number of rows over which quality is measured."""
    start: Start = "cold"
    """Start of the latent solves: zero actions (`cold`), or the rollout of the policy prior (`prior`)."""
    compile: bool = True
    """Also measure the entries with torch.compile. Each takes a minute or more to compile, for each size."""
    baselines: bool = True
    """Also measure Theseus and mpc.pytorch (`make baselines` installs them)."""
    memory: bool = True
    """Also measure peak memory, at each problem's largest batch, in a separate process for each entry."""
    threads: PositiveInt = 1
    """Number of threads of torch."""
    seed: int = 0
    """Seed of the networks and the states."""
    out: Path = RESULTS
    """Folder for the tables, the figure and the record of hardware and versions. `--quick` writes to its subfolder `quick`."""
    cache: Path = Path("runs/benchmark-cache")
    """Folder that caches the fitted networks between runs."""
    quick: bool = False
    """Use tiny sizes and briefly fitted networks, to check that everything runs. The numbers are not meaningful."""


def run(config: Config) -> list[dict[str, str]]:
    """Measure, write `solver-raw.csv`, `solver-summary.csv`, `solver.svg` and `solver.json` to `out`, and return the table.

    The files are rewritten after each cell, so an interrupted run leaves its measurements so far.
    """
    baselines = require_baselines() if config.baselines else {}
    with as_in_runs(config.threads):
        return _Run(config, baselines).measure()


def _cells(config: Config) -> list[Cell]:
    sizes = {
        "latent": [(h, b) for h in config.horizons for b in config.batches],
        "imitation": [(1, 128)],
        "pendulum": [(20, 1), (20, 32)],
    }
    if config.quick:
        sizes = {"latent": [(1, 2)], "imitation": [(1, 2)], "pendulum": [(3, 2)]}
    return [Cell(problem, *size) for problem in config.problems for size in sizes[problem]]


class _Run:
    """The measurements of one run so far."""

    def __init__(self, config: Config, baselines: dict[str, str]):
        self.config, self.baselines, self.began = config, baselines, time.perf_counter()
        self.setup = Setup(config.cache, config.start, 20 if config.quick else 500, config.seed)
        self.repeats = min(config.repeats, 2) if config.quick else config.repeats
        self.rows = min(config.rows, 2) if config.quick else config.rows
        self.samples: list[Sample] = []
        self.quality: list[Quality] = []
        self.memory: dict[tuple[Cell, str], float] = {}

    def measure(self) -> list[dict[str, str]]:
        """Measure every cell: quality first if the problem is new, then time, then memory at the problem's largest batch."""
        cells = _cells(self.config)
        with progress_bar(len(cells)) as (show, advance):
            for index, cell in enumerate(cells):
                chosen = entries(cell, baselines=self.config.baselines, compile=self.config.compile)
                same = [c for c in cells if (c.problem, c.horizon) == (cell.problem, cell.horizon)]
                if cell == same[0]:
                    self._measure_quality(cell, chosen, show)
                self.samples += time_cell(
                    cell, chosen, self.setup, repeats=self.repeats, seconds=self.config.seconds, show=show
                )
                if self.config.memory and cell == max(same, key=lambda c: c.batch):
                    for entry in chosen:
                        show(f"{cell}: {entry.name}, memory")
                        self.memory[cell, entry.name] = peak_megabytes(cell, entry, self.setup)
                lines = self._write(last=index == len(cells) - 1)
                advance()
        return report.table(lines)

    def _measure_quality(self, cell: Cell, chosen: list[Entry], show: Callable[[str], None]) -> None:
        """Measure the quality of the eager entries. A compiled entry computes the same as its eager version, up to rounding."""
        sized = Cell(cell.problem, cell.horizon, self.rows)
        for entry in chosen:
            if not entry.compiled:
                show(f"{sized}: {entry.name}, quality")
                steps = 20 if self.config.quick else 200
                self.quality.append(measure_quality(sized, entry, self.setup, steps=steps))

    def _write(self, last: bool) -> list[report.Line]:
        out = self.config.out / "quick" if self.config.quick else self.config.out
        lines = report.summarise(self.samples, self.memory, self.quality)
        report.write_raw(out / "solver-raw.csv", self.samples)
        report.write_summary(out / "solver-summary.csv", lines)
        report.write_plots(out / "solver.svg", lines)
        settings = self.config.model_dump(mode="json") | {"finished": last}
        seconds = {"seconds": round(time.perf_counter() - self.began, 1)}
        write_record(out / "solver.json", seconds, config=settings, baselines=self.baselines)
        return lines
