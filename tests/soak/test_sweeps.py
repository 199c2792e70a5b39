"""Sweeps in processes of their own, with kills of their runs, of their drivers, of workers of Ray."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from difftori.experiments.plan import plan, read_sweep
from difftori.experiments.slurm import on_slurm
from difftori.experiments.status import run_status
from difftori.experiments.sweep import run_sweep
from difftori.il.weights import load_policy
from difftori.runs.checkpoint import weights_digest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("sweeps"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def long_sweep(folder: Path, runs: int = 12) -> Path:
    """So many runs of some seconds, half of them refiners of the other half."""
    out = folder / "out"
    common = {"env": "pendulum", "epochs": 60, "hidden": [8], "num_train": 50, "eval_episodes": 3, "save_every": 2}
    variants = [{"train": "bc"}, {"train": "residual", "base": f"{out}/{{env}}/bc/seed-{{seed}}"}]
    file = folder / "sweep.yaml"
    grid = {"seed": list(range(runs // 2))}
    file.write_text(yaml.safe_dump({"out": str(out), "common": common, "grid": grid, "variants": variants}))
    return file


def begin(file: Path, *words: str) -> subprocess.Popen:
    """The command in a session of its own."""
    log = file.with_suffix(".log").open("ab")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "difftori.cli", "sweep", str(file), *words],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def weights(out: Path) -> dict[str, str]:
    """A digest for each run of a folder."""
    runs = sorted(out.glob("*/*/seed-?"))
    return {str(run.relative_to(out)): weights_digest(load_policy(run, "last")[0].policy) for run in runs}


def one_training(out: Path) -> int:
    """The process of a run that is at work in the folder, once there is one, from the system's own list."""
    until = time.monotonic() + 240
    while time.monotonic() < until:
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = place.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"train" in words and any(str(out).encode() in word for word in words):
                return int(place.parent.name)
        time.sleep(0.05)
    pytest.fail(f"nothing trains in {out}")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights of the twelve runs when nothing is killed, by run."""
    folder = tmp_path_factory.mktemp("straight")
    assert begin(long_sweep(folder), "--jobs", "2").wait(600) == 0
    return weights(folder / "out")


def test_kills_of_runs_and_of_the_driver_lose_nothing(tmp_path, straight, found):
    """Five kills of runs and two of the driver, at random moments; the weights are those of the quiet sweep."""
    file, chance = long_sweep(tmp_path), torch.Generator().manual_seed(0)
    runs = plan(read_sweep(file))
    driver = begin(file, "--jobs", "2")
    for turn in range(7):
        time.sleep(2 + 4 * torch.rand((), generator=chance).item())
        if turn in (2, 4):
            assert driver.poll() is None
            driver.kill()
            driver.wait()
            driver = begin(file, "--jobs", "2")
        else:
            os.kill(one_training(tmp_path / "out"), signal.SIGKILL)
    if driver.wait(600) != 0:  # more than two deaths of one run are its failure; the same command tries again
        assert begin(file, "--jobs", "2").wait(600) == 0
    assert weights(tmp_path / "out") == straight
    assert {run_status(run).state for run in runs} == {"finished"}
    begun = {run: (run.folder / "command.txt").read_text() for run in runs}
    starts = sum(len(text.splitlines()) for text in begun.values())
    assert 12 <= starts <= 12 + 5, "only what was killed is begun again"
    assert begin(file).wait(120) == 0
    assert {run: (run.folder / "command.txt").read_text() for run in runs} == begun
    same = "12 runs with weights equal to the last bit; the finished sweep repeats nothing"
    found("SIGKILL of a sweep's runs", times=5, result=same)
    found("SIGKILL of the sweep itself", times=2, result=same)


def test_on_ray_a_killed_worker_costs_nothing(tmp_path, straight, found):
    pytest.importorskip("ray")
    file = long_sweep(tmp_path)
    driver = begin(file, "--ray", "local")
    one_training(tmp_path / "out")
    time.sleep(4)
    workers = [p for p in psutil.Process(driver.pid).children(recursive=True) if p.name().startswith("ray::carry_out")]
    assert workers
    for worker in workers:
        worker.kill()
    time.sleep(4)
    os.kill(one_training(tmp_path / "out"), signal.SIGKILL)
    assert driver.wait(600) == 0, file.with_suffix(".log").read_text()
    assert weights(tmp_path / "out") == straight
    found("SIGKILL of Ray's workers, then of a run", result="12 runs with weights equal to the last bit")


@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
def test_through_submitit_a_job_that_is_there_is_not_submitted_again(tmp_path, found):
    """Its local jobs, in the place of Slurm's."""
    runs = plan(read_sweep(long_sweep(tmp_path, runs=2)))

    def engine():
        return on_slurm(
            tmp_path / "jobs", cpus=0.5, gpus=0.0, retries=1, parameters={"timeout_min": 5}, cluster="local"
        )

    messages: list[str] = []
    assert run_sweep(runs, engine(), say=messages.append, done=lambda run: None) == []
    assert {run_status(run).state for run in runs} == {"finished"}
    assert sum("submitted as job" in line for line in messages) == 2
    assert run_sweep(runs, engine(), say=messages.append, done=lambda run: None) == []
    assert sum("submitted as job" in line for line in messages) == 2
    found("a sweep through submitit's local jobs, twice", result="2 jobs, none submitted again")


SLURM = {
    "sbatch": """
        # Every job of the array, one after another in the background, as on a cluster of one core.
        file="$1"; count=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$file"); echo "$file $count" >> "$STAND_IN/submissions"
        number=$((76 + $(wc -l < "$STAND_IN/submissions")))
        (for i in $(seq 0 "${count:-0}"); do
            export SLURM_JOB_ID=$((1000 * number + i)) SLURM_ARRAY_JOB_ID=$number SLURM_ARRAY_TASK_ID=$i
            export SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
            echo "${number}_$i|RUNNING|here" >> "$STAND_IN/states"
            bash "$file" && state=COMPLETED || state=FAILED
            echo "${number}_$i|$state|here" >> "$STAND_IN/states"
        done) > "$STAND_IN/said" 2>&1 &
        echo "Submitted batch job $number" """,
    "srun": """
        while [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
        exec "$@" """,
    "sacct": """
        echo "JobID|State|NodeList"; cat "$STAND_IN/states" 2>/dev/null""",
}
"""The part of Slurm's commands that submitit calls, in its documented form."""


@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="this machine has Slurm")
def test_through_slurms_commands_a_driver_that_is_killed_finds_its_jobs(tmp_path, found, monkeypatch):
    """With a stand-in for sbatch, srun and sacct: six runs, of which three refine the others, so two arrays."""
    (commands := tmp_path / "bin").mkdir()
    for name, script in SLURM.items():
        (commands / name).write_text("#!/bin/bash\n" + textwrap.dedent(script))
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    file = long_sweep(tmp_path, runs=6)
    driver = begin(file, "--slurm")
    one_training(tmp_path / "out")
    driver.kill()
    driver.wait()
    assert begin(file, "--slurm").wait(600) == 0, file.with_suffix(".log").read_text()
    assert {run_status(run).state for run in plan(read_sweep(file))} == {"finished"}
    submissions = (tmp_path / "submissions").read_text().splitlines()
    assert [line.split()[1:] for line in submissions] == [["2"], ["2"]]
    assert begin(file, "--slurm").wait(120) == 0
    assert len((tmp_path / "submissions").read_text().splitlines()) == 2
    result = "6 runs finished in 2 job arrays, none submitted again"
    found("SIGKILL of a sweep on a stand-in for Slurm's commands", result=result)
