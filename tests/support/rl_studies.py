"""Small studies of reinforcement learning, filled with made-up runs."""

import csv
from pathlib import Path

from difftori.experiments.paper import figure3
from difftori.experiments.records import RecordFile, read_run
from difftori.experiments.rl_study import budget_name, make_curves, plan_runs
from difftori.experiments.study import Result
from tests.support.fabricated import write_run

ALL = tuple(figure3.METHODS.values())
PAIR = ALL[:2]


def small_study(place: Path, config_type=figure3.Config, **values):
    """Options of a study of two tasks and two seeds that starts no run, in `place`."""
    given = {
        "tasks": ("cup-catch", "walker-walk"),
        "seeds": 2,
        "steps": 50_000,
        "obs": "state",
        "budget": 0,
        "runs": place / "runs",
        "out": place / "out",
    }
    return config_type(**(given | values))


def fill(config, methods, ends):
    """Every run of the study, with the end return that `ends(run)` gives; None leaves it out."""
    for run in plan_runs(config, methods):
        if (end := ends(run)) is not None:
            write_run(run, end=end)


def curves_of(config, methods=PAIR):
    return make_curves(config, methods, say=lambda text: None)


def result_of(run) -> Result:
    """The run with what its folder holds."""
    record = read_run(run.spec.folder)
    assert record is not None
    return Result(run, record)


def record_file(config) -> RecordFile:
    return RecordFile(config.out / "runs" / f"{budget_name(config)}.jsonl")


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
