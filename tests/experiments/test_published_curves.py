"""The published curves as they are shipped."""

from importlib.resources import files

import numpy as np
import pytest

from difftori.errors import DataError
from difftori.paper import curves
from difftori.paper.curves import printed_points, published_curves
from difftori.paper.numbers import paper_tasks


@pytest.fixture
def fresh():
    published_curves.cache_clear()
    yield
    published_curves.cache_clear()


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_every_curve_is_complete_and_says_where_it_is_from(observation):
    found = published_curves(observation)
    tasks = {row.task for row in paper_tasks()}
    keys = {(curve.method, curve.task) for curve in found}
    assert len(keys) == len(found) > 15
    for curve in found:
        assert curve.task in tasks
        assert curve.returns.shape == (len(curve.returns), len(curve.steps))
        assert curve.steps[-1] <= 1_000_000
        shown = curve.returns[np.isfinite(curve.returns)]
        assert 0 <= shown.min() <= shown.max() <= 1000
        assert len(curve.returns) >= 3
        assert curve.origin.count(",") == 2


def test_known_values():
    """As in the originals, whose means at 100k are also in their authors' tables."""
    by_key = {(c.observation, c.method, c.task): c for o in ("state", "pixels") for c in published_curves(o)}
    drqv2 = by_key["pixels", "DrQ-v2", "walker-walk"]
    assert (drqv2.returns[0, :2].tolist(), drqv2.steps[1]) == ([25.4, 19.8], 20_000)
    assert by_key["state", "TD-MPC", "cheetah-run"].returns[0, :2].tolist() == [11, 137]
    assert by_key["state", "TD-MPC", "cup-catch"].at(100_000).mean() == pytest.approx(977, abs=0.5)
    assert by_key["pixels", "SAC", "walker-walk"].at(1_000_000).mean() == pytest.approx(41, abs=0.5)
    assert by_key["pixels", "DrQ-v2", "walker-walk"].at(30_000).size == 0


def test_printed_means():
    assert {point.task: point.mean for point in printed_points("pixels")}["cheetah-run"] == 222
    assert printed_points("state") == []
    assert published_curves("probe") == ()


def test_licence_and_readme_ship_with_them_and_all_is_small():
    folder = files("difftori.paper").joinpath("published")
    names = {entry.name for entry in folder.iterdir()}
    assert {"README.md", "LICENCE.txt", "methods.csv", "printed.csv"} <= names
    assert sum(len(entry.read_bytes()) for entry in folder.iterdir()) < 1_000_000


@pytest.mark.parametrize("text", ["", "task,seed,0,20000\nx,1,one,2\n", "task,seed,20000,0\nx,1,1,2\n"])
def test_damage_is_named(text, tmp_path, monkeypatch, fresh):
    (tmp_path / "published").mkdir()
    methods = files("difftori.paper").joinpath("published/methods.csv").read_text()
    (tmp_path / "published" / "methods.csv").write_text(methods)
    monkeypatch.setattr(curves, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        published_curves("state")
    (tmp_path / "published" / "state-tdmpc.csv").write_text(text)
    with pytest.raises(DataError, match="state-tdmpc.csv"):
        published_curves("state")
