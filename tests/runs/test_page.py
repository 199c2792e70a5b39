import base64
import html
import json
import re
import shlex
import sys
from html.parser import HTMLParser

import pytest
from tiny_imitation import tiny_config

from difftori.errors import DataError
from difftori.il.train import train
from difftori.runs.page import curves, render, write_report


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


def test_without_rows_there_are_no_curves(tmp_path):
    assert curves([]) == ""
    assert curves([{"step": 1, "time": 2.0, "loss": None}]) == ""
    (tmp_path / "versions.json").write_text(json.dumps({"torch": "1"}))
    assert "<svg" not in render(tmp_path, {"cost": float("nan")})


def test_gaps_negative_numbers_and_single_points_are_drawn():
    rows = [{"step": 1, "a": -1.0, "b": 3}, {"step": 2, "a": None}, {"step": 3, "a": 2.0, "warning": "a is nan"}]
    drawing = curves(rows)
    assert drawing.startswith("<svg")
    assert drawing == curves(rows)
    assert "warning" not in drawing


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(DataError, match=r"versions\.json"):
        render(tmp_path, {})
    with pytest.raises(DataError, match=r"summary\.json"):
        write_report(tmp_path)
