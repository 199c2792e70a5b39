"""Two commits side by side: what is compared."""

import pytest

from benchmarks.versions import Config, compare, run
from difftori.errors import ConfigError


def test_ratios_are_within_a_round():
    before = [{"tdmpc: act": 2.0}, {"tdmpc: act": 20.0}, {"tdmpc: act": 8.0}]
    after = [{"tdmpc: act": 1.0}, {"tdmpc: act": 5.0}, {"tdmpc: act": 8.0}]
    (row,) = compare(before, after)
    assert (row["method"], row["part"]) == ("tdmpc", "act")
    assert (row["lower_quartile"], row["ratio"], row["upper_quartile"]) == (0.375, 0.5, 0.75)
    assert (row["before_ms"], row["after_ms"]) == (8.0, 5.0)


def test_an_unknown_commit_is_named():
    with pytest.raises(ConfigError, match="'no-such-commit' is no commit"):
        run(Config(before="no-such-commit"))
