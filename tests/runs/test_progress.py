import io
import logging

import pytest
from rich.console import Console

from difftori.runs import progress
from difftori.runs.progress import LongRunHint, Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_count_and_time_left_are_never_cut(clock):
    with Progress(False) as bar, bar.phase("training: environment steps", 1_000_000, 250_000) as phase:
        assert phase.line(80) == "training: environment steps  250000/1000000"
        clock[0] += 3600
        phase.update(500_000, "123456 updates  return 812.3  eval return 799.1, and much more that does not matter")
        head = "training: environment steps  500000/1000000  2:00:00 left"
        assert phase.line(80).startswith(head + "  123456 updates")
        assert len(phase.line(80)) <= 80
        assert phase.line(30) == head
        assert phase.line().endswith("does not matter")


def test_on_a_terminal_of_80_columns_each_phase_is_one_line(clock):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with Progress(True, console=console) as bar, bar.phase("training: updates", 100_000) as phase:
        clock[0] += 60
        phase.update(25_000, "x" * 200)
        with bar.phase("evaluation: 10 episodes"):
            lines = bar._text().plain.splitlines()
            assert bar._live is not None
            bar._live.refresh()
    assert [len(line) <= 79 for line in lines] == [True, True]
    assert lines[0].startswith("training: updates  25000/100000  3:00 left")
    assert lines[1] == "evaluation: 10 episodes  0:00"
    assert "training: updates  25000/100000  3:00 left" in screen.getvalue()


def test_without_a_terminal_there_is_a_line_every_so_often(clock, capsys):
    console = Console(file=io.StringIO())
    with Progress(True, console=console) as bar, bar.phase("training: updates", 10) as phase:
        for step in range(1, 11):
            clock[0] += 10
            phase.update(step, f"loss {step}")
        with bar.phase("saving"):
            clock[0] += 30
            bar.report()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["training: updates  3/10  1:10 left  loss 3", "training: updates  6/10  0:40 left  loss 6"]
    assert lines[-1] == "training: updates  10/10  0:00 left  loss 10 · saving  0:30"
    assert len(lines) == 4


def test_nothing_is_shown_if_not_wanted(clock, capsys):
    with Progress(False) as bar, bar.phase("training", 10) as phase:
        clock[0] += 100
        phase.update(5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (245.4, "4:05"), (11045.0, "3:04:05"), (183_600.0, "2 days 3 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_run_of_days_is_told_once_and_the_first_updates_do_not_count(caplog):
    hint = LongRunHint(1_000_000, ["--preset compact", "--device cuda"])
    with caplog.at_level(logging.WARNING):
        for update in range(1, 40):
            hint(update, 500.0 + update)  # the first update compiled for minutes
    assert len(caplog.messages) == 1
    assert "at 1 updates per second, this run will take about 11.6 days" in caplog.messages[0]
    assert caplog.messages[0].endswith("with --preset compact or --device cuda")


def test_a_run_of_hours_is_not_commented_on(caplog):
    hint = LongRunHint(10_000, ["--device cuda"])
    for update in range(1, 40):
        hint(update, float(update))
    assert not caplog.messages
