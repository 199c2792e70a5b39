"""Sweeps from the command line: finished runs stay finished when a process is killed."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from difftori.cli import main
from difftori.errors import ConfigError
from difftori.experiments import pool
from difftori.experiments.plan import beside, plan, read_sweep
from difftori.experiments.pool import Failure
from difftori.experiments.ray_cluster import _missing_machine, on_ray
from difftori.experiments.status import RunStatus, counts, run_status, table
from difftori.experiments.sweep import split_ready
from difftori.il.weights import load_policy
from difftori.runs.checkpoint import weights_digest

# Looked for, not imported: its set-up closes every handler of the process, and with absl's the stream that pytest reads.
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")

COMMON = {"env": "pendulum", "epochs": 2, "hidden": [8], "num_train": 4, "eval_episodes": 3}


@pytest.fixture
def sweep(tmp_path):
    """A file of two policies and what refines the first, and the folder of their runs."""
    out = tmp_path / "out"
    variants = [{"train": "residual", "base": f"{out}/{{env}}/bc/seed-{{seed}}"}, {"train": "bc"}]
    file = tmp_path / "sweep.yaml"
    common = {name: value for name, value in COMMON.items()}
    file.write_text(yaml.safe_dump({"out": str(out), "common": common, "grid": {"seed": [0, 1]}, "variants": variants}))
    return file


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs are trained here, because a new process takes seconds to import torch; the list of what was begun."""
    begun = []

    def start(work, variables=None):
        begun.append(work.name)
        work.folder.parent.mkdir(parents=True, exist_ok=True)
        status = main(list(work.command))
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])

    monkeypatch.setattr(pool, "_start", start)
    return begun


def weights(folder: Path) -> dict[str, str]:
    """What every run has learned, without the paths that its export names."""
    found = [path.parent for path in sorted(folder.rglob("policy.pt"))]
    return {str(run.relative_to(folder)): weights_digest(load_policy(run, "last")[0].policy) for run in found}


def test_a_sweep_runs_bases_first_and_again_repeats_nothing(sweep, in_this_process, capsys):
    assert main(["sweep", str(sweep), "--status"]) == 0
    assert "4 waiting" in capsys.readouterr().out
    assert main(["sweep", str(sweep), "--jobs", "2"]) == 0
    assert "4 finished" in capsys.readouterr().out
    assert [name.split("/")[1].split("_")[0] for name in in_this_process] == ["bc", "bc", "residual", "residual"]
    capsys.readouterr()
    assert main(["sweep", str(sweep), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert len(in_this_process) == 4


def test_two_sweeps_in_one_folder_have_one_report(sweep, in_this_process, tmp_path):
    given = yaml.safe_load(sweep.read_text())
    for seed in (0, 1):
        file = tmp_path / f"part-{seed}.yaml"
        file.write_text(yaml.safe_dump({**given, "grid": {"seed": [seed]}, "variants": [{"train": "bc"}]}))
        assert main(["sweep", str(file), "--quiet"]) == 0
    rows = (tmp_path / "out" / "report" / "runs.csv").read_text().splitlines()
    assert len(rows) == 1 + 2


def test_what_refines_a_run_that_failed_is_not_started_and_the_rest_is(sweep, monkeypatch, in_this_process, capsys):
    runs = plan(read_sweep(sweep))
    bad = next(run for run in runs if run.base is None)

    def start(work, variables=None):
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({int(work == bad)})"])

    monkeypatch.setattr(pool, "_start", start)
    assert main(["sweep", str(sweep)]) == 1
    shown = capsys.readouterr()
    assert "1 run(s) failed" in shown.err
    assert run_status(bad).state == "failed"
    assert run_status(next(run for run in runs if run.base is bad)).state == "waiting"


def test_states_are_told_from_folders(sweep):
    import fcntl

    runs = plan(read_sweep(sweep))
    run = runs[1]
    assert counts([run_status(run) for run in runs]) == "4 waiting"
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("{}")
    (run.folder / "metrics.jsonl").write_text('{"step": 7, "time": 1.0}\n')
    assert (run_status(run).state, run_status(run).step) == ("interrupted", 7)
    with (run.folder / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_status(run).state == "running"
    beside(run.folder, ".failed.json").write_text(json.dumps({"status": 1, "host": "here", "reason": "it broke"}))
    assert run_status(run).note == "status 1 on here: it broke"
    beside(run.folder, ".failed.json").write_text("[")
    assert "cannot be read" in run_status(run).note
    (run.folder / "summary.json").write_text('{"last/success": 0.5}')
    assert (run_status(run).state, run_status(run).note) == ("finished", "last/success 0.5")


def test_of_many_runs_methods_are_counted_and_only_what_is_urgent_is_named(sweep):
    (run, *_) = plan(read_sweep(sweep))
    found = [RunStatus(run, state, 3, "why") for state in ["finished"] * 50 + ["running"] * 70 + ["failed"] * 2]
    shown = table(found)
    assert shown[0] == {
        "run": f"*/{run.folder.parent.name}/*",
        "state": "",
        "step": "",
        "": "50 finished, 70 running, 2 failed",
    }
    assert [line["state"] for line in shown[1:61]] == ["failed"] * 2 + ["running"] * 58
    assert shown[61:] == [{"run": "… and 12 more", "state": "", "step": "", "": "12 running"}]
    assert table(found[:60]) == [s.row() for s in found[:60]]


def test_one_engine_at_a_time(sweep, capsys):
    assert main(["sweep", str(sweep), "--slurm", "--ray", "auto"]) == 2
    assert main(["sweep", str(sweep), "--jobs", "0"]) == 2


@pytest.mark.skipif(shutil.which("srun") is not None, reason="this machine has Slurm")
@needs_submitit
def test_without_slurm_there_is_a_clear_error(sweep, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "submitit"]:
        monkeypatch.delitem(sys.modules, name)
    handler = logging.StreamHandler()
    monkeypatch.setattr(handler, "close", lambda: pytest.fail("importing submitit closed somebody's handler"))
    assert main(["sweep", str(sweep), "--slurm"]) == 2
    assert "--slurm: " in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("srun") is not None, reason="this machine has Slurm")
@needs_submitit
def test_what_slurm_refuses_is_told(sweep, capsys, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, does in (("srun", "true"), ("sbatch", "echo 'AssocMaxSubmitJobLimit' >&2; exit 1"), ("sacct", "true")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert main(["sweep", str(sweep), "--slurm"]) == 1
    messages = " ".join(capsys.readouterr().err.split())
    assert "Slurm accepted 0 of 2 runs and rejected the next" in messages
    assert "AssocMaxSubmitJobLimit" in messages


def test_a_failure_travels_between_machines(sweep):
    """Engines send runs and outcomes as pickles of their own."""
    (run, *_) = plan(read_sweep(sweep))
    failure = Failure(run, 1, "it broke")
    assert pickle.loads(pickle.dumps(failure)) == failure


def test_a_ray_cluster_without_a_machine_large_enough_is_told():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    assert _missing_machine(nodes, 4.0, 0.5) is None
    assert "no machine of the Ray cluster has as many (8 cores and 1 GPUs)" in str(_missing_machine(nodes, 4.0, 2.0))
    with pytest.raises(ConfigError, match=r"gpus: 1\.5 for each run"):
        on_ray("local", cpus=1.0, gpus=1.5, retries=0)


def test_what_another_machine_has_finished_is_a_base_before_it_is_seen_here(sweep):
    refiner = next(run for run in plan(read_sweep(sweep)) if run.base is not None)
    assert refiner.base is not None
    assert split_ready([refiner]) == ([], [refiner])
    assert split_ready([refiner], {refiner.base.folder}) == ([refiner], [])


def test_a_longer_sweep_in_the_same_folder_names_the_way_to_extend_its_runs(sweep, in_this_process, capsys):
    assert main(["sweep", str(sweep)]) == 0
    sweep.write_text(sweep.read_text().replace("epochs: 2", "epochs: 3"))
    assert main(["sweep", str(sweep)]) == 2
    assert "extend each run, difftori train --resume RUN --steps or --updates or --epochs N" in " ".join(
        capsys.readouterr().err.split()
    )
