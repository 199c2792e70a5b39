"""What pages say of this repository is true of it."""

import re
from pathlib import Path

from difftori.trainers import known_names
from tests.support.trainers import TRAINERS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()


def test_every_test_that_is_named_exists():
    """`file.py`, `folder/`, `file.py::test_name`; a … in the place of a file is the one before, at a name's end any end."""
    file, named = TESTS / "absent", 0
    for path, name in re.findall(r"`([\w/…]+(?:\.py|/|…))(?:::(test_\w+…?))?`", PAGE):
        file = file if path == "…" else TESTS / path
        assert file.exists(), path
        if name:
            named += 1
            end = r"\w*" if name.endswith("…") else r"\b"
            assert re.search(rf"def {name.rstrip('…')}{end}\(", file.read_text()), f"{path}::{name}"
    assert named > 30


def test_the_long_tests_leave_no_policy_and_no_agent_out():
    assert sorted(TRAINERS) == known_names()
