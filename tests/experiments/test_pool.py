"""Processes that carry out commands: failures, retries, runs that others are at work on, signals."""

import fcntl
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from difftori.errors import ConfigError
from difftori.experiments import pool
from difftori.experiments.gpus import GPUs
from difftori.experiments.plan import RunSpec
from difftori.experiments.pool import Failure, RunsFailedError, report_failures, run_all, run_one


def python(monkeypatch, code: str) -> None:
    """Lets runs execute `code` with their words as arguments, instead of the command line."""
    launch = pool.subprocess.Popen
    monkeypatch.setattr(
        pool.subprocess, "Popen", lambda words, **options: launch([sys.executable, "-c", code, *words[3:]], **options)
    )


def runs(folder, *names):
    return [RunSpec(name, (name,), folder / "logs" / name) for name in names]


def test_a_failure_takes_nothing_down_and_is_named(tmp_path, monkeypatch):
    python(monkeypatch, "import sys, os; print('it says:', sys.argv[1]); os._exit(sys.argv[1] == 'bad')")
    messages = []
    done: list[str] = []
    failures, left = run_all(
        runs(tmp_path, "good", "bad", "fine"),
        jobs=2,
        seconds=None,
        say=messages.append,
        done=lambda w: done.append(w.name),
    )
    assert sorted(done) == ["fine", "good"]
    assert [(f.run.name, f.status) for f in failures] == [("bad", 1)]
    assert left == []
    assert {"good: done", "fine: done"} <= set(messages)
    with pytest.raises(RunsFailedError, match="bad: status 1"):
        report_failures(failures)
    report_failures([])


def test_when_the_budget_is_spent_nothing_more_begins(tmp_path, monkeypatch):
    python(monkeypatch, "import time; time.sleep(.3)")
    messages = []
    failures, left = run_all(runs(tmp_path, "first", "second"), jobs=1, seconds=0.05, say=messages.append)
    assert failures == []
    assert [run.name for run in left] == ["second"]
    assert messages[-1] == "first: done"


def test_a_signal_lets_runs_save_and_starts_no_more(tmp_path, monkeypatch):
    code = (
        "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1])"
        f".with_name('saved').touch() or sys.exit(143))); (pathlib.Path({str(tmp_path)!r}) / 'up').touch(); time.sleep(30)"
    )
    python(monkeypatch, code)
    monkeypatch.chdir(tmp_path)
    wait = pool.time.sleep

    def sleep(seconds):
        if (tmp_path / "up").exists():
            pool.os.kill(pool.os.getpid(), 15)
        wait(seconds)

    monkeypatch.setattr(pool.time, "sleep", sleep)
    messages = []
    with pytest.raises(SystemExit) as ended:
        run_all(runs(tmp_path, "first", "second"), jobs=1, seconds=None, say=messages.append)
    assert ended.value.code == 143
    assert (tmp_path / "saved").exists()
    assert "1 interrupted, 1 not started" in messages[-1]


def run_of(tmp_path, code: str, monkeypatch) -> RunSpec:
    """A run's folder, and `code` in place of its process."""
    python(monkeypatch, code)
    (tmp_path / "runs").mkdir()
    return RunSpec("it", ("it",), tmp_path / "runs" / "one")


def test_a_run_that_dies_is_taken_up_again_and_its_tries_are_counted(tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    code = f"""
import os, pathlib, signal, sys
seen = pathlib.Path({str(seen)!r})
count = len(seen.read_text()) if seen.exists() else 0
seen.write_text("x" * (count + 1))
print("words:", *sys.argv[1:], flush=True)
if count < 2: os.kill(os.getpid(), signal.SIGKILL)
folder = pathlib.Path({str(tmp_path / "runs" / "one")!r}); folder.mkdir(); (folder / "summary.json").write_text("{{}}")
"""
    run = run_of(tmp_path, code, monkeypatch)
    messages = []
    failures, _ = run_all([run], jobs=1, seconds=None, say=messages.append, retries=1)
    assert [(f.status, f.reason) for f in failures] == [(-9, "words: it")]
    assert sum("restarting (1 of 1)" in line for line in messages) == 1
    note = json.loads((tmp_path / "runs" / "one.failed.json").read_text())
    assert (note["status"], note["reason"]) == (-9, "words: it")

    assert run_one(run, say=messages.append) is None
    assert run.finished
    assert not (tmp_path / "runs" / "one.failed.json").exists()
    assert len(seen.read_text()) == 3


def test_faulty_options_are_not_tried_again(tmp_path, monkeypatch):
    run = run_of(tmp_path, "raise SystemExit(2)", monkeypatch)
    assert run_one(run, retries=5) == Failure(run, 2, "no output")


def test_a_run_that_was_begun_is_resumed(tmp_path):
    run = RunSpec("it", ("train", "bc"), tmp_path / "one")
    assert run.command == ("train", "bc")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").touch()
    assert run.command[:2] == ("train", "--resume")


@pytest.mark.parametrize("finishes", [True, False])
def test_a_run_in_another_process_is_waited_for(tmp_path, monkeypatch, finishes):
    """It ends there, or is gone on with here when that process is gone."""
    run = run_of(tmp_path, f"import pathlib; pathlib.Path({str(tmp_path / 'here')!r}).touch()", monkeypatch)
    run.folder.mkdir()
    (run.folder / "run.lock").touch()
    done, messages = [], []
    with (run.folder / "run.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run.locked
        waiting = threading.Thread(
            target=lambda: run_all([run], jobs=1, seconds=None, say=messages.append, done=done.append), daemon=True
        )
        waiting.start()
        time.sleep(0.5)
        assert messages == ["it: running in another process, waiting for it"]
        if finishes:
            (run.folder / "summary.json").write_text("{}")
    waiting.join(20)
    assert done == [run]
    assert (tmp_path / "here").exists() is not finishes


def test_no_process_is_left_behind_by_whatever_ends_the_work(tmp_path, monkeypatch):
    run = run_of(tmp_path, "import time; time.sleep(60)", monkeypatch)
    started: list[subprocess.Popen] = []
    launch = pool.subprocess.Popen
    monkeypatch.setattr(pool.subprocess, "Popen", lambda *a, **k: started.append(launch(*a, **k)) or started[-1])

    def look(crew):
        raise RuntimeError("an engine's own way to end us")

    monkeypatch.setattr(pool._ProcessPool, "_look", look)
    with pytest.raises(RuntimeError, match="an engine's own way"):
        run_one(run)
    assert [process.poll() for process in started] == [-15]


def test_runs_share_gpus_evenly_and_each_sees_its_own_only(tmp_path, monkeypatch):
    code = (
        "import os, sys, time, pathlib; time.sleep(.3);"
        "pathlib.Path(sys.argv[1]).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    python(monkeypatch, code)
    monkeypatch.chdir(tmp_path)
    names = [str(i) for i in range(4)]
    gpus = GPUs(0.5, ["0", "1"])
    failures, left = run_all(runs(tmp_path, *names), jobs=gpus.slots, seconds=None, say=print, gpus=gpus)
    assert (failures, left) == ([], [])
    assert sorted((tmp_path / name).read_text() for name in names) == ["0", "0", "1", "1"]
    assert gpus.take() == "0", "all were given back"


def test_a_run_may_have_several_gpus():
    gpus = GPUs(2.0, list("abcde"))
    assert gpus.slots == 2
    assert [gpus.take(), gpus.take()] == ["a,b", "c,d"]
    gpus.give_back("a,b")
    assert gpus.take() == "a,b"


@pytest.mark.parametrize(("per_run", "names"), [(0.5, []), (2.0, ["0"]), (1.5, ["0", "1"])])
def test_gpus_that_are_not_there_are_refused(per_run, names):
    with pytest.raises(ConfigError, match=f"{per_run:g} for each run, and {len(names)} in this machine"):
        GPUs(per_run, names)


def test_two_pools_on_the_same_runs_share_the_work(tmp_path, monkeypatch):
    code = """
import fcntl, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
lock = (folder / 'run.lock').open('a')
try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: print('it is in use by another process'); sys.exit(2)
time.sleep(.6)
(folder / 'summary.json').write_text('{}')
"""
    python(monkeypatch, code)
    every = [RunSpec(name, (str(tmp_path / name),), tmp_path / name) for name in "abcd"]
    done: list[list[str]] = [[], []]
    began = time.monotonic()
    pools = [
        threading.Thread(
            target=lambda own=own: run_all(every, jobs=1, seconds=None, say=print, done=lambda r: own.append(r.name))
        )
        for own in done
    ]
    for one in pools:
        one.start()
    for one in pools:
        one.join(30)
    assert [sorted(own) for own in done] == [list("abcd")] * 2
    starts = [(tmp_path / f"{name}.log").read_text().count("in use") for name in "abcd"]
    assert sum(starts) <= 2, f"they start the same run again and again, {time.monotonic() - began:.1f} s"


def test_a_kill_without_output_counts_even_if_the_log_ends_with_an_older_message(tmp_path, monkeypatch):
    run = run_of(tmp_path, "import os; os.kill(os.getpid(), 9)", monkeypatch)
    run.log.write_text("out: one is in use by another process. Fix: wait\n")
    messages = []
    failures, _ = run_all([run], jobs=1, seconds=None, say=messages.append, retries=2)
    assert [(f.status, f.reason) for f in failures] == [(-9, "no output")]
    assert sum("restarting" in line for line in messages) == 2


def test_a_folder_that_cannot_be_written_fails_its_run_only(tmp_path, monkeypatch):
    python(monkeypatch, "pass")
    (tmp_path / "file").write_text("no folder can be here")
    bad, good = RunSpec("bad", ("x",), tmp_path / "file" / "a" / "b"), RunSpec("good", ("x",), tmp_path / "good")
    done = []
    failures, left = run_all([bad, good], jobs=1, seconds=None, say=print, done=done.append, retries=2)
    assert ([f.run for f in failures], left, done) == ([bad], [], [good])
    assert "cannot be started" in failures[0].reason


def test_a_refiner_starts_with_its_base_finished_and_waits_for_no_other_run(tmp_path, monkeypatch):
    code = (
        "import pathlib, sys, time; folder = pathlib.Path(sys.argv[1]); time.sleep(float(sys.argv[2]));"
        "folder.mkdir(parents=True); (folder / 'summary.json').write_text('{}')"
    )
    python(monkeypatch, code)
    base = RunSpec("base", (str(tmp_path / "base"), "0"), tmp_path / "base")
    slow = RunSpec("slow", (str(tmp_path / "slow"), "4"), tmp_path / "slow")
    refiner = RunSpec("refiner", (str(tmp_path / "refiner"), "0"), tmp_path / "refiner", base)
    orphan = RunSpec("orphan", (str(tmp_path / "orphan"), "0"), tmp_path / "orphan", RunSpec("no", (), tmp_path / "no"))
    done = []
    failures, left = run_all(
        [refiner, orphan, base, slow], jobs=2, seconds=None, say=print, done=lambda run: done.append(run.name)
    )
    assert (done, failures, left) == (["base", "refiner", "slow"], [], [orphan])


def test_a_run_of_other_settings_is_neither_adopted_nor_resumed(tmp_path, monkeypatch):
    python(monkeypatch, "raise SystemExit('it was started')")
    run = RunSpec("it", ("it",), tmp_path / "one", config={"seed": 0, "settings.epochs": 20, "device": "cpu"})
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text("seed: 0\nsettings: {epochs: 40}\ndevice: cuda\n")
    for finished in (False, True):
        if finished:
            (run.folder / "summary.json").write_text("{}")
        failures, _ = run_all([run], jobs=1, seconds=None, say=print, retries=2)
        (failure,) = failures
        assert failure.status == 2
        assert "settings.epochs: 20 here, 40 in its config.yaml" in failure.reason
        assert "device" not in failure.reason


def test_a_process_that_outlived_its_sweep_takes_a_job_and_its_gpu(tmp_path, monkeypatch):
    """Not so one of a sweep that is still there, which has jobs of its own."""
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    python(monkeypatch, code)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid, begins in ((gone.pid, False), (pool.os.getpid(), True)):
        place = tmp_path / str(pid)
        orphan, other = (RunSpec(name, (str(place / f"{name}.out"),), place / name) for name in ("orphan", "other"))
        orphan.folder.mkdir(parents=True)
        note = {"host": pool.socket.gethostname(), "pid": pid, "gpus": "0"}
        (place / "orphan.sweep.json").write_text(json.dumps(note))
        with (orphan.folder / "run.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = threading.Thread(
                target=lambda runs=(orphan, other): run_all(
                    runs, jobs=1, seconds=None, say=print, gpus=GPUs(1.0, ["0", "1"])
                ),
                daemon=True,
            )
            waiting.start()
            time.sleep(1.0)
            assert (place / "other.out").exists() is begins
        waiting.join(20)
        assert (place / "other.out").exists()
    gpus = GPUs(1.0, ["0", "1"])
    gpus.reserve("0")
    assert gpus.take() == "1"


def test_the_message_of_a_folder_in_use_is_found_among_the_lines_of_its_holder(tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    code = f"""
import pathlib, sys
seen = pathlib.Path({str(seen)!r})
if seen.exists(): sys.exit(0)
seen.touch(); print('it is in use by another process', flush=True); print('a warning of the holder', flush=True); sys.exit(2)
"""
    run = run_of(tmp_path, code, monkeypatch)
    done = []
    assert run_all([run], jobs=1, seconds=None, say=print, done=done.append) == ([], [])
    assert done == [run]


def test_an_engine_starts_a_refiner_whose_base_it_knows_to_be_finished(tmp_path, monkeypatch):
    run = run_of(tmp_path, f"import pathlib; pathlib.Path({str(tmp_path / 'here')!r}).touch()", monkeypatch)
    assert run_one(replace(run, base=RunSpec("base", (), tmp_path / "not-yet-seen"))) is None
    assert (tmp_path / "here").exists()


def test_a_run_that_the_terminal_took_down_is_tried_again(tmp_path, monkeypatch):
    run = run_of(tmp_path, "import os; os.kill(os.getpid(), 1)", monkeypatch)
    messages = []
    failures, _ = run_all([run], jobs=1, seconds=None, say=messages.append, retries=2)
    assert [failure.status for failure in failures] == [-1]
    assert sum("restarting" in line for line in messages) == 2


@pytest.mark.parametrize(
    ("visible", "names"), [("-1", []), ("NoDevFiles", []), ("0,-1,1", ["0"]), ("2, 2,3", ["2", "3"]), ("", [])]
)
def test_gpus_are_those_that_cuda_sees(monkeypatch, visible, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if names:
        assert GPUs(1.0).names == tuple(names)
    else:
        with pytest.raises(ConfigError, match="0 in this machine"):
            GPUs(1.0)
