"""The benchmark of reinforcement learning on a probe: what it writes and how its ratios are made."""

import csv
import json

import pytest

from benchmarks.rl import METHODS, Config, run


def test_it_measures_every_part_of_every_method(tmp_path):
    rows = run(Config(env="probe:delayed-reward", preset="compact", repeats=2, out=tmp_path))
    assert [row["method"] for row in rows] == [c.name for c in METHODS]
    with (tmp_path / "rl-state-compact.csv").open() as file:
        written = list(csv.DictReader(file))
    for row in written:
        assert float(row["act_ms"]) > 0
        assert float(row["update_ms"]) > 0
        assert (float(row["episode_ms"]) > 0) == ("per-episode" in row["method"])
    first, last = written[0], written[-1]
    assert float(last["act_ratio"]) == pytest.approx(float(last["act_ms"]) / float(first["act_ms"]), rel=1e-3)
    assert float(first["training_ratio"]) == 1
    raw = json.loads((tmp_path / "rl-state-compact.json").read_text())["raw_ms"]
    assert {len(values) for values in raw.values()} == {2}
