import base64
import html
import json
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import pytest
from tiny_imitation import tiny_config

from difftori.errors import DataError
from difftori.il.train import train
from difftori.runs.figures import metric_figures, svg_element, thousands
from difftori.runs.page import keep_evaluation, read_evaluations, render, write_report


class Checker(HTMLParser):
    """Collects every address that a browser would fetch, and every script."""

    def __init__(self):
        super().__init__()
        self.fetched, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.fetched += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset") and value
        ]


def test_the_page_of_a_run_holds_everything_and_fetches_nothing(tmp_path):
    out = tmp_path / "my <run>"
    train(tiny_config(epochs=3), out, progress=False)
    (out / "media").mkdir()
    (out / "media" / "swing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    (out / "media" / "dot.png").write_bytes(b"\x89PNG")
    (out / "media" / "notes.txt").write_text("left out")
    page = write_report(out).read_text()
    checker = Checker()
    checker.feed(page)
    assert "script" not in checker.tags
    assert {"svg", "img", "table", "pre"} <= checker.tags
    assert all(address.startswith(("data:", "#")) for address in checker.fetched)
    assert not re.search(r"url\((?!#)", page)
    assert "my &lt;run&gt;" in page
    for words in (
        "best/validation_error",
        "validation/error",
        "tiny_imitation:Tiny",
        "torch",
        html.escape(shlex.join(sys.argv)),
        "swing",
        "dot",
    ):
        assert words in page
    assert base64.b64encode(b"\x89PNG").decode() in page
    assert "left out" not in page


def test_evaluations_of_one_run_at_the_same_time_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for value in range(24):
            pool.submit(keep_evaluation, tmp_path, {"return": float(value)}, {"return": [float(value)]}, {})
    assert sorted(entry["metrics"]["return"] for entry in read_evaluations(tmp_path)) == list(range(24))


def test_without_rows_there_are_no_curves(tmp_path):
    assert metric_figures([]) == {}
    assert metric_figures([{"step": 1, "time": 2.0, "loss": None}]) == {}
    (tmp_path / "versions.json").write_text(json.dumps({"torch": "1"}))
    assert "<svg" not in render(tmp_path, {"cost": float("nan")})


def test_gaps_negative_numbers_and_single_points_are_drawn():
    rows = [{"step": 1, "a": -1.0, "b": 3}, {"step": 2, "a": None}, {"step": 3, "a": 2.0, "warning": "a is nan"}]
    (figure,) = metric_figures(rows).values()
    drawing = svg_element(figure)
    assert drawing.startswith("<svg")
    assert drawing == svg_element(metric_figures(rows)["other"])
    assert "warning" not in drawing
    single = next(axis for axis in figure.axes if axis.get_title() == "b").lines[0]
    assert (single.get_marker(), len(single.get_xdata())) == ("o", 1)


def test_results_are_first_on_linear_axes_and_the_other_metrics_in_groups():
    rows = [{"step": 100 * k, "train/return": 1.0 + 999 * k, "train/loss": 10.0**k} for k in range(4)]
    rows += [{"step": 400, "zoo/z": 1.0, "seconds/b": 1.0, "seconds/a": 2.0, "update/q": 1.0, "eval/length": 5.0}]
    before = metric_figures(rows, "environment steps")
    assert list(before) == [
        "results",
        "evaluation",
        "training",
        "losses and gradients, means over updates",
        "time",
        "other",
    ]
    (results,) = before["results"].axes
    assert (results.get_title(), results.get_yscale(), results.get_xlabel()) == (
        "train/return",
        "linear",
        "environment steps",
    )
    assert [line.get_label() for line in results.lines] == ["train/return"], "also before the first evaluation"
    assert before["training"].axes[0].get_yscale() == "log"
    assert len(before["time"].axes) == 1
    after = metric_figures([*rows, {"step": 400, "eval/success": 0.5, "eval/return": 3.0}])["results"]
    assert [[line.get_label() for line in axis.lines] for axis in after.axes] == [
        ["train/return", "eval/return"],
        ["eval/success"],
    ]
    assert len(after.axes[0].get_yticks()) > 2
    only_loss = metric_figures([{"step": 1, "validation/error": 0.5, "train/loss": 1.0}])
    assert only_loss["results"].axes[0].get_title() == "validation/error"


@pytest.mark.parametrize("name", ["train/" + "a_long_name_" * 12, "train/$\\foo$_{<b>"])
def test_long_and_odd_names_lie_inside_their_figure(name):
    figure = metric_figures([{"step": 1, name: 1.0, "train/other": 2.0}])["training"]
    figure.canvas.draw()
    title = figure.axes[0].title
    box, whole = title.get_window_extent(), figure.bbox
    assert box.x0 >= whole.x0
    assert box.x1 <= figure.axes[1].bbox.x1
    assert box.y1 <= whole.y1
    assert title.get_text().replace("\n", "") == name


def test_tick_labels():
    assert [thousands(v) for v in (0.0, 250.0, 1250.0, 2e4, 1.5e6)] == ["0", "250", "1.25k", "20k", "1.5M"]


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(DataError, match=r"versions\.json"):
        render(tmp_path, {})
    with pytest.raises(DataError, match=r"summary\.json"):
        write_report(tmp_path)
