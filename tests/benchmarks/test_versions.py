"""Two commits side by side: the ratio of a round is of medians measured in that round."""

import pytest

from benchmarks.versions import Config, compare, run
from difftori.errors import ConfigError


def test_ratios_are_by_round():
    before = [{"tdmpc: act": [2.0, 2.0, 50.0], "tdmpc: sample": [1.0]}, {"tdmpc: act": [20.0], "tdmpc: sample": [1.0]}]
    after = [{"tdmpc: act": [1.0], "tdmpc: sample": [1.0]}, {"tdmpc: act": [5.0], "tdmpc: sample": [1.0]}]
    (row,) = compare(before, after)
    assert (row["method"], row["part"]) == ("tdmpc", "act")
    assert (row["ratio"], row["lowest_ratio"], row["highest_ratio"]) == (0.375, 0.25, 0.5)
    assert (row["before_ms"], row["after_ms"]) == (11.0, 3.0)


def test_an_unknown_commit_is_named():
    with pytest.raises(ConfigError, match="'no-such-commit' is no commit"):
        run(Config(before="no-such-commit"))
