"""Runs commands as processes of their own, a few at once, so that one that dies takes no other with it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from difftori.errors import DifftoriError
from difftori.experiments.plan import RunSpec, beside
from difftori.runs.checkpoint import replace_file
from difftori.runs.signals import StopSignal

_WAIT = 0.1
_TO_SAVE = 600.0
_TAKEN = "is in use by another process"
_HOPELESS = 2
"""Exit status of a command whose options are at fault: another try says the same."""


class RunsFailedError(DifftoriError, RuntimeError):
    """Some runs failed; the message names each, why, and its log."""


@dataclass(frozen=True)
class Failure:
    """A run that ended with another status than 0; `reason` is the last line of its output."""

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
) -> tuple[list[Failure], list[RunSpec]]:
    """Run `runs`, `jobs` at once, and return those that failed and those that were never started; `done` hears of the rest.

    One that dies, or ends with another status than 0 and 2, is tried up to `retries` times again, from its last checkpoint.
    A run that another process is at work on, such as one that outlived the process that started it, is waited for. After `seconds`
    nothing is started any more; what runs is finished. On SIGTERM or SIGINT every process is asked to save and leave, and
    SystemExit raised with status 143 or 130.
    """
    until = None if seconds is None else time.monotonic() + seconds
    processes = _ProcessPool(runs, say, done, retries)
    with StopSignal() as stop:
        processes.run(jobs, until, lambda: stop.requested)
        if stop.requested:
            say(
                f"stopped: {len(processes.running)} saved, {len(processes.waiting)} not started; re-run the same command to resume"
            )
            stop.leave()
    return processes.failures, list(processes.waiting)


def run_one(run: RunSpec, *, retries: int = 0, say: Callable[[str], None] = print) -> Failure | None:
    """Carry it out, as `run_all` does, for an engine that has its own way with signals; whatever ends this, the process is
    asked to save first.
    """
    processes = _ProcessPool([run], say, lambda run: None, retries)
    processes.run(1, None, lambda: False)
    return processes.failures[0] if processes.failures else None


class _ProcessPool:
    """The processes at work, here and elsewhere, and what came of those that ended."""

    def __init__(
        self, runs: Sequence[RunSpec], say: Callable[[str], None], done: Callable[[RunSpec], None], retries: int
    ):
        self.waiting, self.failures = deque(runs), list[Failure]()
        self.running: dict[subprocess.Popen[bytes], RunSpec] = {}
        self.locked: list[RunSpec] = []
        self._say, self._done, self._retries, self._tries = say, done, retries, Counter[str]()

    def run(self, jobs: int, until: float | None, stopped: Callable[[], bool]) -> None:
        """Work until nothing is left to do, or to be done by then. Whatever ends it, no process is left behind."""
        try:
            while not stopped():
                while self.waiting and self._busy < jobs and (until is None or time.monotonic() < until):
                    self._begin(self.waiting.popleft())
                if not self._busy:
                    break
                self._look()
                time.sleep(_WAIT)
        finally:
            self._end()

    @property
    def _busy(self) -> int:
        """Works that run, here or elsewhere."""
        return len(self.running) + len(self.locked)

    def _begin(self, run: RunSpec) -> None:
        """Start it, unless another process is at it."""
        if run.locked:
            self._say(f"{run.name}: running in another process; waiting for it")
            self.locked.append(run)
        else:
            self._say(f"{run.name}: running ({len(self.waiting)} wait)")
            _forget_failure(run)
            self.running[_start(run)] = run

    def _look(self) -> None:
        """See what has ended since the last time."""
        for run in [run for run in self.locked if not run.locked]:
            self.locked.remove(run)
            if run.finished:
                self._succeed(run)
            else:
                self.waiting.appendleft(run)
        for process in [process for process in self.running if process.poll() is not None]:
            run = self.running.pop(process)
            if process.returncode == 0 or run.finished:
                self._succeed(run)
            elif run.locked or _TAKEN in _last_line(run):  # another process was faster to take the folder
                self.waiting.appendleft(run)
            else:
                self._fail(Failure(run, process.returncode, _last_line(run)))

    def _end(self) -> None:
        """Ask every process here to save and leave, and wait until they have."""
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
        _forget_failure(run)
        self._done(run)

    def _fail(self, failure: Failure) -> None:
        run, ended = failure.run, f"status {failure.status}: {failure.reason}"
        if failure.status != _HOPELESS and self._tries[run.name] < self._retries:
            self._tries[run.name] += 1
            self._say(f"{run.name}: ended with {ended}; trying again ({self._tries[run.name]} of {self._retries})")
            self.waiting.appendleft(run)
            return
        self._say(f"{run.name}: FAILED with {ended}")
        self.failures.append(failure)
        note = {"status": failure.status, "reason": failure.reason, "host": socket.gethostname()}
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        replace_file(beside(run.folder, ".failed.json"), (json.dumps(note) + "\n").encode())


def report_failures(failures: Sequence[Failure]) -> None:
    """Raise RunsFailedError if there are any."""
    if failures:
        lines = [f"  {f.run.name}: status {f.status}, {f.reason} (full log: {f.run.log})" for f in failures]
        raise RunsFailedError(
            f"{len(failures)} run(s) failed, and what depends on them was not started; re-run the same command to try again:\n"
            + "\n".join(lines)
        )


def _forget_failure(run: RunSpec) -> None:
    beside(run.folder, ".failed.json").unlink(missing_ok=True)


def _start(run: RunSpec) -> subprocess.Popen[bytes]:
    """A session of its own keeps the terminal's Ctrl-C away from it: `run_all` passes it on. An existing log is appended to.

    With a safe path the working directory is searched last for modules, as by the command itself, and not first.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "difftori.cli", *run.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
            start_new_session=True,
        )


def _last_line(run: RunSpec) -> str:
    lines = run.log.read_text(errors="replace").split("\n") if run.log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
