"""Runs commands as separate processes, several concurrently, bases before their refiners. A crash affects one run only."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from difftori.errors import DifftoriError
from difftori.experiments.gpus import GPUs
from difftori.experiments.plan import FAILED, RunSpec, beside
from difftori.runs.checkpoint import replace_file
from difftori.runs.process import StopSignal

_WAIT = 0.1
_TO_SAVE = 600.0
_SWEEP = ".sweep.json"
"""Suffix of the file beside a running run that names the process which started it, its host and the run's GPUs."""
_TAKEN = "is in use by another process"
_HOPELESS, _NOT_STARTED = 2, 126
"""The exit code for invalid arguments, and the status of a run whose process could not be started. Both would fail again at once."""


class RunsFailedError(DifftoriError, RuntimeError):
    """Some runs failed. The message lists each run, its error and its log."""


@dataclass(frozen=True)
class Failure:
    """A run that ended with an exit code other than 0. `reason` is the last line of its output."""

    run: RunSpec
    status: int
    reason: str


def run_all(
    runs: Sequence[RunSpec],
    *,
    jobs: int,
    seconds: float | None,
    say: Callable[[str], None],
    done: Callable[[RunSpec], None] = lambda run: None,
    retries: int = 0,
    gpus: GPUs | None = None,
) -> tuple[list[Failure], list[RunSpec]]:
    """Run `runs`, with `jobs` concurrent processes. Returns the failures and the runs that were not started; `done` gets each other run.

    A refiner starts when its base is finished, and not at all if that fails. A run that crashes, or ends with an exit code other
    than 0 and 2, is restarted up to `retries` times, from its last checkpoint. Runs that other processes work on, such as those
    that outlived their parent, are waited for, while others are started. After `seconds`, no further run is started; running
    ones are finished. With `gpus`, each process sees those that it is given only. On SIGTERM or SIGINT, every process saves a
    checkpoint and exits, and SystemExit is raised with status 143 or 130.
    """
    until = None if seconds is None else time.monotonic() + seconds
    processes = _ProcessPool(runs, say, done, retries, gpus)
    with StopSignal() as stop:
        processes.run(jobs, until, lambda: stop.requested)
        if stop.requested:
            say(
                f"stopped: {len(processes.running)} interrupted, {len(processes.waiting)} not started. Re-run the same command to resume"
            )
            stop.leave()
    return processes.failures, list(processes.waiting)


def run_one(run: RunSpec, *, retries: int = 0, say: Callable[[str], None] = print) -> Failure | None:
    """Run one run like `run_all`, for an engine that handles signals itself. If this call is interrupted, the process saves a
    checkpoint first.
    """
    # The engine has started it after its base, which this machine may not see yet, as on a network file system.
    processes = _ProcessPool([replace(run, base=None)], say, lambda run: None, retries)
    processes.run(1, None, lambda: False)
    return replace(processes.failures[0], run=run) if processes.failures else None


class _Started(NamedTuple):
    """A run with a process here, its GPUs, and the size of its log when it started."""

    run: RunSpec
    gpus: str | None
    log_start: int


class _ProcessPool:
    """The running processes, those of other programs on the same runs, and the failures so far."""

    def __init__(
        self,
        runs: Sequence[RunSpec],
        say: Callable[[str], None],
        done: Callable[[RunSpec], None],
        retries: int,
        gpus: GPUs | None = None,
    ):
        self.waiting, self.failures = deque(runs), list[Failure]()
        self.running: dict[subprocess.Popen[bytes], _Started] = {}
        self.locked: list[RunSpec] = []
        self._say, self._done, self._retries, self._tries = say, done, retries, Counter[str]()
        self._gpus = gpus
        # Those of `locked` whose sweep on this machine is gone, and their GPUs.
        self._orphans: dict[RunSpec, str | None] = {}
        # Whether a run has ended since the last look for one that can start.
        self._changed = True

    def run(self, jobs: int, until: float | None, stopped: Callable[[], bool]) -> None:
        """Run until all runs have ended, or until the time `until`. All processes are stopped if this call is interrupted."""
        try:
            while not stopped():
                if until is None or time.monotonic() < until:
                    self._begin_ready(jobs)
                if not self.running and not self.locked:
                    break
                self._look()
                time.sleep(_WAIT)
        finally:
            self._end()

    def _begin_ready(self, jobs: int) -> None:
        """Start runs until `jobs` are running, in their order: those whose base is finished, and that no other process works on."""
        if not self._changed:
            return
        for run in list(self.waiting):
            if len(self.running) + len(self._orphans) >= jobs:
                return
            if not run.ready:
                continue
            self.waiting.remove(run)
            if run.locked:
                self._say(f"{run.name}: running in another process, waiting for it")
                self.locked.append(run)
                self._take_over(run)
            elif fault := run.conflict():
                self._fail(Failure(run, _HOPELESS, fault))
            elif run.finished:
                self._succeed(run)
            else:
                self._begin(run)
        self._changed = False

    def _take_over(self, run: RunSpec) -> None:
        """Count a running process whose sweep was killed on this machine as one of this pool's, with its GPUs."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(beside(run.folder, _SWEEP).read_bytes())
            if note["host"] == socket.gethostname() and not _is_alive(int(note["pid"])):
                self._orphans[run] = gpus = note["gpus"]
                if self._gpus is not None and gpus is not None:
                    self._gpus.reserve(gpus)

    def _free(self, gpus: str | None) -> None:
        """Give back the GPUs of a run, if it had any."""
        if self._gpus is not None and gpus is not None:
            self._gpus.give_back(gpus)

    def _begin(self, run: RunSpec) -> None:
        """Start the process of a run. A folder that cannot be written, as on a full disk, is a failure of this run."""
        self._say(f"{run.name}: running ({len(self.waiting)} waiting)")
        taken = None if self._gpus is None else self._gpus.take()
        try:
            _forget_failure(run)
            start = run.log.stat().st_size if run.log.exists() else 0
            process = _start(run, None if taken is None else {"CUDA_VISIBLE_DEVICES": taken})
        except OSError as error:
            self._free(taken)
            self._fail(Failure(run, _NOT_STARTED, f"it cannot be started ({error})"))
            return
        self.running[process] = _Started(run, taken, start)
        note = {"host": socket.gethostname(), "pid": os.getpid(), "gpus": taken}
        with contextlib.suppress(OSError):  # a full disk, or another sweep that starts the same run now
            replace_file(beside(run.folder, _SWEEP), (json.dumps(note) + "\n").encode())

    def _look(self) -> None:
        """Handle the runs that have ended since the last call."""
        for run in [run for run in self.locked if not run.locked]:
            self.locked.remove(run)
            self._changed = True
            self._free(self._orphans.pop(run, None))
            if run.finished and not run.conflict():
                self._succeed(run)
            else:
                self.waiting.appendleft(run)
        for process in [process for process in self.running if process.poll() is not None]:
            (run, gpus, log_start), self._changed = self.running.pop(process), True
            said = _said(run, log_start)
            if not run.locked:
                with contextlib.suppress(OSError):
                    beside(run.folder, _SWEEP).unlink(missing_ok=True)
            self._free(gpus)
            if process.returncode == 0 or (run.finished and not run.conflict()):
                self._succeed(run)
            elif process.returncode == _HOPELESS and any(_TAKEN in line for line in said):
                # Another process locked the directory first, and may write to the same log.
                self.waiting.appendleft(run)
            else:
                self._fail(Failure(run, process.returncode, said[-1] if said else "no output"))

    def _end(self) -> None:
        """Terminate every process of this pool, and wait until it has saved its checkpoint."""
        for process in self.running:
            process.terminate()
        until = time.monotonic() + _TO_SAVE
        for process in self.running:
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _succeed(self, run: RunSpec) -> None:
        self._say(f"{run.name}: done")
        with contextlib.suppress(OSError):
            _forget_failure(run)
        self._done(run)

    def _fail(self, failure: Failure) -> None:
        run, ended = failure.run, f"status {failure.status}: {failure.reason}"
        if failure.status not in (_HOPELESS, _NOT_STARTED) and self._tries[run.name] < self._retries:
            self._tries[run.name] += 1
            self._say(f"{run.name}: ended with {ended}; restarting ({self._tries[run.name]} of {self._retries})")
            self.waiting.appendleft(run)
            return
        self._say(f"{run.name}: FAILED with {ended}")
        self.failures.append(failure)
        note = {"status": failure.status, "reason": failure.reason, "host": socket.gethostname()}
        try:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            replace_file(beside(run.folder, FAILED), (json.dumps(note) + "\n").encode())
        except OSError as error:
            self._say(f"{run.name}: its error could not be noted in its folder ({error})")


def report_failures(failures: Sequence[Failure]) -> None:
    """Raise RunsFailedError if there are failures."""
    if failures:
        lines = [f"  {f.run.name}: status {f.status}, {f.reason} (full log: {f.run.log})" for f in failures]
        raise RunsFailedError(
            f"{len(failures)} run(s) failed; runs that depend on them were not started. "
            "Fix: correct the errors below and re-run the same command:\n" + "\n".join(lines)
        )


def _forget_failure(run: RunSpec) -> None:
    beside(run.folder, FAILED).unlink(missing_ok=True)


def _start(run: RunSpec, variables: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start the process of a run, with further environment variables. Its output is appended to the run's log.

    The process has its own session, so that it does not get the terminal's Ctrl-C; `run_all` forwards it. PYTHONSAFEPATH makes
    the working directory the last place that is searched for modules, as in the command itself, and not the first.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "difftori.cli", *run.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own, **(variables or {})},
            start_new_session=True,
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def _said(run: RunSpec, start: int) -> list[str]:
    """Return the lines of a run's log after its first `start` bytes, without empty ones."""
    lines = run.log.read_bytes()[start:].decode(errors="replace").split("\n") if run.log.exists() else []
    return [line.strip() for line in lines if line.strip()]
