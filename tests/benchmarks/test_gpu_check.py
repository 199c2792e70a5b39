"""`difftori bench gpu-check`: a failing step is named at the end, and costs only itself. The steps themselves run in CI (`.ci/run`)."""

import csv

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Config, Step
from difftori.errors import DifftoriError


def test_a_failing_step_is_named_after_all_have_run(tmp_path, monkeypatch):
    steps = [
        Step("broken", ("-c", "raise SystemExit(3)"), 60.0),
        Step("slow", ("-c", "import time; time.sleep(60)"), 2.0, ends_early=True),
        Step("hangs", ("-c", "import time; time.sleep(60)"), 2.0),
        Step("sound", ("-c", "print('done')"), 60.0),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda config, folder: steps)
    with pytest.raises(DifftoriError, match="failed: broken, hangs. Fix: read"):
        gpu_check.run(Config(device="cpu", quick=True, out=tmp_path))
    with (tmp_path / "steps.csv").open() as file:
        ended = {row["step"]: row["result"] for row in csv.DictReader(file)}
    assert ended["broken"].startswith("FAILED with status 3")
    assert ended["slow"] == "stopped at its time limit"
    assert ended["sound"] == "passed"
    assert (tmp_path / "logs" / "sound.txt").read_text() == "done\n"
    assert "broken" in (tmp_path / "summary.md").read_text()


def test_every_step_passes_where_all_do(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "steps", lambda config, folder: [Step("sound", ("-c", ""), 60.0)])
    assert [row["result"] for row in gpu_check.run(Config(device="cpu", quick=True, out=tmp_path))] == ["passed"]
