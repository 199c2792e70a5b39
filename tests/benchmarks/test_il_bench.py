"""The benchmark of refiners: what it writes and how its ratios are made."""

import csv
import json

import pytest

from benchmarks.il import REFINERS, Config, run


def test_it_measures_an_update_and_an_action_of_every_method(tmp_path):
    rows = run(Config(repeats=1, out=tmp_path))
    assert [row["method"] for row in rows] == ["bc", *(each.name for each in REFINERS)]
    with (tmp_path / "il-bc.csv").open() as file:
        base, *others = list(csv.DictReader(file))
    assert float(base["update_ratio"]) == float(base["act_ratio"]) == 1
    for row in others:
        for part in ("update", "act"):
            expected = float(row[f"{part}_ms"]) / float(base[f"{part}_ms"])
            assert float(row[f"{part}_ratio"]) == pytest.approx(expected, rel=1e-3)
    raw = json.loads((tmp_path / "il-bc.json").read_text())["raw_ms"]
    assert {len(values) for values in raw.values()} == {1}
