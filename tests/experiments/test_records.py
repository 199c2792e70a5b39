"""Record files: what is appended is read again, whatever is killed, and by however many processes at once."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from difftori.errors import DataError
from difftori.experiments.records import RETURN, Record, RecordFile, is_record_file

RECORD = Record(
    config={"agent": "tdmpc", "seed": 0},
    hardware="abacus, 1 thread(s)",
    versions={"torch": "2", "git_commit": None},
    command="difftori train tdmpc",
    summary={"return": 1 / 3},
    evaluations=({"step": 0, RETURN: 0.5, "note": None},),
    episodes={"last": {"seed": [1], "success": [1.0]}},
)


@pytest.fixture
def file(tmp_path) -> RecordFile:
    return RecordFile(tmp_path / "deep" / "study.jsonl")


def test_a_record_comes_back_as_it_was(file):
    assert file.read() == {}
    file.append("a/b/seed-0", RECORD)
    file.append("é/seed-1", replace(RECORD, summary={"return": math.nan}, weights="abc"))
    found = file.read()
    assert found["a/b/seed-0"] == RECORD
    assert math.isnan(found["é/seed-1"].summary["return"])
    assert found["é/seed-1"].weights == "abc"
    assert is_record_file(file.path)


def test_a_record_of_an_earlier_version_is_read_with_todays_names(file):
    old = replace(RECORD, summary={"decisions": 4.0}, evaluations=({RETURN: 1.0, "judged/obs_q": 2.0},))
    file.append("a", old)
    expected = replace(RECORD, summary={"agent_steps": 4.0}, evaluations=({RETURN: 1.0, "eval/obs_q": 2.0},))
    assert file.read() == {"a": expected}


def test_a_run_is_appended_once(file):
    file.append("a", RECORD)
    file.append("a", replace(RECORD, command="another"))
    assert file.read() == {"a": RECORD}


def test_a_line_that_a_kill_cut_short_is_left_out_and_overwritten(file):
    for name in ("a", "b"):
        file.append(name, RECORD)
    content = file.path.read_bytes()
    for cut in range(content.index(b"\n") + 1, len(content)):
        file.path.write_bytes(content[:cut])
        assert set(file.read()) == {"a"}
    file.append("b", RECORD)
    assert file.path.read_bytes() == content


def test_a_damaged_line_is_named(file):
    file.append("a", RECORD)
    good = file.path.read_text()
    for damage in ("[]", "{}", good.replace('"config"', '"confg"').strip(), good.replace("[1.0]", "[]").strip()):
        file.path.write_text(f"{good}{damage}\n")
        with pytest.raises(DataError, match=r"study\.jsonl, line 2: not a valid record"):
            file.read()


def test_processes_append_at_the_same_time(file):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: file.append(f"run-{n % 40}", RECORD), range(80)))
    assert len(file.read()) == 40
    assert len(file.path.read_text().splitlines()) == 40


def test_the_repositorys_records_are_readable():
    files = sorted((Path(__file__).parents[2] / "results" / "runs").rglob("*.jsonl"))
    counts = [len(RecordFile(path).read()) for path in files]
    assert counts == [len(path.read_text().splitlines()) for path in files]
    assert sum(counts) >= 363
