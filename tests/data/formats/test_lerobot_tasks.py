"""Data sets of several tasks, as LeRobot records them: an instruction for each episode."""

import json
import logging

import pytest

from difftori import cli
from difftori.data.formats import describe_demos, read_demos, write_lerobot
from difftori.errors import DataError
from tests.data.formats.test_lerobot_v2 import write as write_v2
from tests.support.demo_files import assert_same, tiny

PICK, PLACE = "pick the cube", "place it, slowly"


@pytest.fixture(params=["v3", "v2"])
def path(request, tmp_path):
    """Three episodes; the second is of another task."""
    tasks = [[PICK], [PLACE], [PICK]]
    if request.param == "v2":
        path = write_v2(tiny(), tmp_path / "d")
        file = path / "meta/episodes.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [json.dumps({**row, "tasks": own}) for row, own in zip(rows, tasks, strict=True)]
        file.write_text("\n".join(lines))
        return path
    path = tmp_path / "d"
    write_lerobot(tiny(), path, fps=10, task=PICK)
    return changed(path, tasks)


def changed(path, tasks):
    """The data set with the column `tasks` replaced, or without it for None."""
    import pyarrow as pa
    from pyarrow import parquet

    (file,) = (path / "meta/episodes").glob("*/*")
    table = parquet.read_table(file).drop(["tasks"])
    parquet.write_table(table if tasks is None else table.append_column("tasks", pa.array(tasks)), file)
    return path


def test_one_task_is_read_by_its_instruction(path):
    assert_same(read_demos(path, subset=PICK), tiny().select([0, 2]))
    assert_same(read_demos(path, subset=PICK, episodes=["1:"]), tiny().select([2]))
    assert_same(read_demos(path), tiny())
    assert read_demos(path).tasks == {PICK: 2, PLACE: 1}
    assert read_demos(path, episodes=[1]).tasks == {}
    with pytest.raises(DataError, match=r"no task 'pick'.*'pick the cube', 'place it, slowly'"):
        read_demos(path, subset="pick")
    with pytest.raises(DataError, match="none of the chosen"):
        read_demos(path, subset=PLACE, episodes=[0])


def test_the_tasks_are_listed(path, capsys):
    assert describe_demos(path).task_table() == [
        {"task": PICK, "episodes": 2, "numbers": "0 2"},
        {"task": PLACE, "episodes": 1, "numbers": "1"},
    ]
    assert cli.main(["data", str(path)]) == 0
    assert PLACE in capsys.readouterr().out


def test_a_policy_is_trained_on_one_task_and_warned_of_several(path, tmp_path, caplog):
    short = ["--updates", "2", "--batch-size", "2", "--obs-keys", "state", "--quiet", "--demos", str(path)]
    with caplog.at_level(logging.WARNING):
        assert cli.main(["train", "bc", *short, "--episodes", PICK, "--out", str(tmp_path / "one")]) == 0
        assert "tasks" not in caplog.text
        assert cli.main(["train", "bc", *short, "--out", str(tmp_path / "all")]) == 0
    assert "2 tasks" in caplog.text
    assert json.loads((tmp_path / "one/data.json").read_text())["fingerprint"]["episodes"].startswith("2 of")


def test_without_tasks_all_episodes_are_read_by_number(tmp_path):
    write_lerobot(tiny(), tmp_path / "d", fps=10, task=PICK)
    assert describe_demos(changed(tmp_path / "d", None)).tasks == {}
    with pytest.raises(DataError, match="neither tasks"):
        read_demos(tmp_path / "d", subset=PICK)


def test_a_set_whose_tasks_are_no_lists_of_texts_is_read_all_the_same(tmp_path):
    write_lerobot(tiny(), tmp_path / "d", fps=10, task=PICK)
    assert_same(read_demos(changed(tmp_path / "d", [[6], [7], [8]])), tiny())
    assert describe_demos(tmp_path / "d").tasks == {}
    changed(tmp_path / "d", [[PICK], None, [PLACE]])
    assert describe_demos(tmp_path / "d").tasks == {PICK: (0,), PLACE: (2,)}
    changed(tmp_path / "d", [PICK, PICK, PLACE])
    assert describe_demos(tmp_path / "d").tasks == {PICK: (0, 1), PLACE: (2,)}
