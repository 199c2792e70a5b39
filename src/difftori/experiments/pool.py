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
from pathlib import Path
from typing import Any

from difftori.errors import DifftoriError
from difftori.runs.checkpoint import replace_file
from difftori.runs.locks import is_held
from difftori.runs.signals import StopSignal

_WAIT = 0.1
_TO_SAVE = 600.0
_TAKEN = "is in use by another process"
_HOPELESS = 2
"""Exit status of a command whose options are at fault: another try says the same."""


class RunsFailedError(DifftoriError, RuntimeError):
    """Some runs failed; the message names each, why, and its log."""


@dataclass(frozen=True)
class Work:
    """A command to run: `words` after `difftori`, the file that takes what it says, and the run's folder if it is one.

    A run that was begun goes on as it was begun, wherever it is to compute now.
    """

    name: str
    words: tuple[str, ...]
    log: Path
    folder: Path | None = None

    @property
    def command(self) -> tuple[str, ...]:
        """The words that begin it, or that let it go on."""
        begun = self.folder is not None and (self.folder / "config.yaml").exists()
        return ("train", "--resume", str(self.folder), "--quiet") if begun else self.words

    @property
    def finished(self) -> bool:
        """Whether the folder's run has ended, by whoever's hand."""
        return self.folder is not None and (self.folder / "summary.json").exists()

    @property
    def elsewhere(self) -> bool:
        """Whether another process is at work in the folder."""
        return self.folder is not None and is_held(self.folder / "run.lock")


def option_words(name: str, value: Any) -> list[str]:
    """An option of the command line with its value."""
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{word}" if value else f"--no-{word}"]
    words = [str(part) for part in value] if isinstance(value, tuple | list) else [str(value)]
    return [f"--{word}", *words]


def training(name: str, words: tuple[str, ...], folder: Path) -> Work:
    """The run of a folder."""
    return Work(name, words, beside(folder, ".log"), folder)


def beside(folder: Path, suffix: str) -> Path:
    """A file beside a run's folder: `.log` is what its processes said, `.failed.json` why it was given up."""
    return folder.with_name(folder.name + suffix)


@dataclass(frozen=True)
class Failure:
    """Work that ended with another status than 0; `reason` is the last line that it said."""

    work: Work
    status: int
    reason: str


def run_all(
    works: Sequence[Work],
    *,
    jobs: int,
    seconds: float | None,
    say: Callable[[str], None],
    done: Callable[[Work], None] = lambda work: None,
    retries: int = 0,
) -> tuple[list[Failure], list[Work]]:
    """Run `works`, `jobs` at once, and return those that failed and those that were never started; `done` hears of the rest.

    One that dies, or ends with another status than 0 and 2, is tried up to `retries` times again, from its last checkpoint.
    A run that another process is at work on, such as one that outlived whoever started it, is waited for. After `seconds`
    nothing is started any more; what runs is finished. On SIGTERM or SIGINT every process is asked to save and leave, and
    SystemExit raised with status 143 or 130.
    """
    until = None if seconds is None else time.monotonic() + seconds
    crew = _Crew(works, say, done, retries)
    with StopSignal() as stop:
        crew.work(jobs, until, lambda: stop.requested)
        if stop.requested:
            say(f"stopped: {len(crew.running)} saved, {len(crew.waiting)} not started; the same command goes on")
            stop.leave()
    return crew.failures, list(crew.waiting)


def run_one(work: Work, *, retries: int = 0, say: Callable[[str], None] = print) -> Failure | None:
    """Run it, as `run_all` does, for an engine that has its own way with signals; whatever ends this, the process is
    asked to save first.
    """
    crew = _Crew([work], say, lambda work: None, retries)
    crew.work(1, None, lambda: False)
    return crew.failures[0] if crew.failures else None


class _Crew:
    """The processes at work, here and elsewhere, and what came of those that ended."""

    def __init__(self, works: Sequence[Work], say: Callable[[str], None], done: Callable[[Work], None], retries: int):
        self.waiting, self.failures = deque(works), list[Failure]()
        self.running: dict[subprocess.Popen[bytes], Work] = {}
        self.elsewhere: list[Work] = []
        self._say, self._done, self._retries, self._tries = say, done, retries, Counter[str]()

    def work(self, jobs: int, until: float | None, stopped: Callable[[], bool]) -> None:
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
        return len(self.running) + len(self.elsewhere)

    def _begin(self, work: Work) -> None:
        """Start it, unless another process is at it."""
        if work.elsewhere:
            self._say(f"{work.name}: running in another process; waiting for it")
            self.elsewhere.append(work)
        else:
            self._say(f"{work.name}: running ({len(self.waiting)} wait)")
            _forget_failure(work)
            self.running[_start(work)] = work

    def _look(self) -> None:
        """See what has ended since the last time."""
        for work in [work for work in self.elsewhere if not work.elsewhere]:
            self.elsewhere.remove(work)
            if work.finished:
                self._succeed(work)
            else:
                self.waiting.appendleft(work)
        for process in [process for process in self.running if process.poll() is not None]:
            work = self.running.pop(process)
            if process.returncode == 0 or work.finished:
                self._succeed(work)
            elif work.elsewhere or _TAKEN in _last_line(work):  # another process was faster to take the folder
                self.waiting.appendleft(work)
            else:
                self._fail(Failure(work, process.returncode, _last_line(work)))

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

    def _succeed(self, work: Work) -> None:
        self._say(f"{work.name}: done")
        _forget_failure(work)
        self._done(work)

    def _fail(self, failure: Failure) -> None:
        work, said = failure.work, f"status {failure.status}: {failure.reason}"
        if failure.status != _HOPELESS and self._tries[work.name] < self._retries:
            self._tries[work.name] += 1
            self._say(f"{work.name}: ended with {said}; trying again ({self._tries[work.name]} of {self._retries})")
            self.waiting.appendleft(work)
            return
        self._say(f"{work.name}: FAILED with {said}")
        self.failures.append(failure)
        if work.folder is not None:  # for whoever asks later, perhaps from another machine
            note = {"status": failure.status, "reason": failure.reason, "host": socket.gethostname()}
            work.folder.parent.mkdir(parents=True, exist_ok=True)
            replace_file(beside(work.folder, ".failed.json"), (json.dumps(note) + "\n").encode())


def report_failures(failures: Sequence[Failure]) -> None:
    """Raise RunsFailedError if there are any."""
    if failures:
        lines = [f"  {f.work.name}: status {f.status}, {f.reason} (all of it: {f.work.log})" for f in failures]
        raise RunsFailedError(
            f"{len(failures)} run(s) failed, and what depends on them was not started; the same command tries again:\n"
            + "\n".join(lines)
        )


def _forget_failure(work: Work) -> None:
    if work.folder is not None:
        beside(work.folder, ".failed.json").unlink(missing_ok=True)


def _start(work: Work) -> subprocess.Popen[bytes]:
    """A session of its own keeps the terminal's Ctrl-C away from it: `run_all` passes it on. A log is gone on with.

    With a safe path the working directory is searched last for modules, as by the command itself, and not first.
    """
    work.log.parent.mkdir(parents=True, exist_ok=True)
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with work.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "difftori.cli", *work.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
            start_new_session=True,
        )


def _last_line(work: Work) -> str:
    lines = work.log.read_text(errors="replace").split("\n") if work.log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
