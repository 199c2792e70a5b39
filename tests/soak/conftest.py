"""What the long tests find, as a table: with `--found FILE` it is written there."""

import csv
import os
import platform
from pathlib import Path

import pytest
import torch

COLUMNS = ["what", "trainer", "times", "result", "machine"]


def pytest_addoption(parser):
    parser.addoption("--found", type=Path, help="where to write what the long tests tried, how often, with what result")


@pytest.fixture
def found(record_property):
    """Take down what was tried on which trainer, how often, and what came of it."""

    def take_down(what: str, *, trainer: str = "", times: int = 1, result: str) -> None:
        record_property("found", {"what": what, "trainer": trainer, "times": times, "result": result})

    return take_down


def pytest_terminal_summary(terminalreporter, config):
    """Of all processes, because reports carry it to the first."""
    place = config.getoption("--found", default=None)
    if place is None:
        return
    reports = [
        report for kind in ("passed", "failed", "error", "skipped") for report in terminalreporter.getreports(kind)
    ]
    lines = [value for report in reports for name, value in report.user_properties if name == "found"]
    lines += [{"what": r.nodeid, "times": 1, "result": r.outcome.upper()} for r in reports if r.outcome != "passed"]
    machine = (
        f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    with place.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {**line, "machine": machine}
            for line in sorted(lines, key=lambda line: (line["what"], line.get("trainer", "")))
        )
