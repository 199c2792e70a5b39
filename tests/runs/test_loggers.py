"""Weights & Biases, by a stand-in module that records what it is given."""

import json
import sys
from pathlib import Path

import pytest

from difftori import cli
from difftori.errors import MissingExtraError
from difftori.runs.records import read_metrics
from tests.runs.test_run import opened

STAND_IN = """
import json
from pathlib import Path

class Run:
    def __init__(self, given):
        self.file, self.summary = Path("wandb.jsonl"), {}
        self.write("init", given)

    def write(self, what, given):
        with self.file.open("a") as file:
            file.write(json.dumps([what, given]) + "\\n")

    def log(self, metrics, step):
        self.write("log", {"step": step, **metrics})

    def finish(self):
        self.write("finish", self.summary)

def init(**given):
    return Run(given)
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Install the stand-in. Returns a function that reads the calls so far."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support" / "out_of_tree"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "wandb.jsonl").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_config_name_metrics_and_summary_are_passed_and_a_resumed_run_is_continued(calls, tmp_path, monkeypatch):
    from difftori.runs.run import Run
    from tests.runs.test_run import Settings

    monkeypatch.setenv("WANDB_PROJECT", "lab")
    with Run(tmp_path / "one", Settings(), seed=0, threads=1, device="cpu", wandb=True) as run:
        run.log(1, {"loss": 2.0, "bad": float("nan")})
        run.save(1, {})
    with opened(tmp_path / "one") as run:  # without the option
        run.restore()
        run.log(2, {"loss": 1.0})
        run.finish({"cost": 1.5, "bad": float("inf")})
    opened(tmp_path / "one").close()  # finished: nothing to log
    (init, first), *logged, (_, ended), (_, again), second, (_, summary) = calls()
    assert init == "init"
    assert first["config"] == {"seed": 0, "name": "é", "inner": {"lr": 0.1}}
    assert (first["name"], first["project"], first["dir"]) == ("one", "lab", str(tmp_path / "one"))
    assert (first["resume"], first["id"]) == ("allow", again["id"])
    assert logged == [["log", {"step": 1, "loss": 2.0}]]
    assert (ended, second, summary) == ({}, ["log", {"step": 2, "loss": 1.0}], {"cost": 1.5})
    assert len(read_metrics(tmp_path / "one")) == 2
    assert (tmp_path / "one" / "tensorboard").is_dir()


@pytest.mark.parametrize(
    "words",
    [
        "tiny_imitation:Tiny --env tiny_imitation:make --num-train 6 --eval-episodes 3 --epochs 2",
        "tdmpc --env probe:two-step --preset small --seed-steps 20 --steps 60 --eval-every 40 --eval-episodes 2",
    ],
)
def test_policies_and_agents_log_to_it(calls, capsys, words):
    assert cli.main(["train", *words.split(), "--out", "run", "--quiet", "--wandb"]) == 0
    found = calls()
    assert found[0][1]["name"] == "run"
    assert [c[1]["step"] for c in found if c[0] == "log"] == [row["step"] for row in read_metrics(Path("run"))]
    assert found[-1][0] == "finish"
    assert found[-1][1]["parameters"] > 0


def test_without_wandb_the_run_is_refused_before_it_begins(tmp_path, monkeypatch):
    from difftori.runs.run import Run
    from tests.runs.test_run import Settings

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"difftori\[wandb\]"):
        Run(tmp_path / "one", Settings(), seed=0, threads=1, device="cpu", wandb=True)
    assert list(tmp_path.iterdir()) == []
