"""The paper's printed numbers as they are shipped."""

import pytest

from difftori.errors import ConfigError
from difftori.paper.numbers import (
    RESULTS,
    PaperNumber,
    paper_numbers,
    paper_settings,
    paper_tasks,
    paper_timings,
)


def test_table_8_holds_the_printed_values():
    rows = paper_numbers("table8_pendulum_cost")
    assert PaperNumber("no-damping", "expert", "", 13.126, None) in rows
    assert PaperNumber("damping", "difftori", "", 10.644, 0.029) in rows
    assert len(rows) == 8


@pytest.mark.parametrize("table", RESULTS)
def test_every_table_reads_without_gaps(table):
    rows = paper_numbers(table)
    keys = {(row.task, row.method, row.variant) for row in rows}
    assert len(keys) == len(rows) > 0
    assert all(row.task and row.method and row.mean >= 0 for row in rows)


def test_the_other_files_read_too():
    assert len(paper_tasks()) == 15
    assert paper_tasks()[0].action_repeat == 8
    assert ("rl", "discount", "0.99") in {(row.part, row.name, row.value) for row in paper_settings()}
    assert len(paper_timings()) == 3


def test_an_unknown_table_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="table8_pendulum_cost"):
        paper_numbers("table12")
