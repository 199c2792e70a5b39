"""Runs commands as processes of their own, a few at once, so that one that dies takes no other with it."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftori.errors import DifftoriError
from difftori.training.signals import StopSignal

_WAIT = 0.1
_TO_SAVE = 600.0


class RunsFailedError(DifftoriError, RuntimeError):
    """Some runs of a study failed; the message names each, why, and its log."""


@dataclass(frozen=True)
class Work:
    """A command to run: `words` after `difftori`, and the file that takes what it says."""

    name: str
    words: tuple[str, ...]
    log: Path


def option_words(name: str, value: Any) -> list[str]:
    """An option of the command line with its value."""
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{word}" if value else f"--no-{word}"]
    words = [str(part) for part in value] if isinstance(value, tuple | list) else [str(value)]
    return [f"--{word}", *words]


def training(name: str, words: tuple[str, ...], folder: Path) -> Work:
    """The command that begins the run of a folder; one that was interrupted goes on as it was begun, wherever it is to
    compute now.
    """
    begun = (folder / "config.yaml").exists()
    resumed = ("train", "--resume", str(folder), "--quiet")
    return Work(name, resumed if begun else words, folder.with_name(f"{folder.name}.log"))


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
) -> tuple[list[Failure], list[Work]]:
    """Run `works`, `jobs` at once, and return those that failed and those that were never started; `done` hears of the rest.

    After `seconds` nothing is started any more; what runs is finished. On SIGTERM or SIGINT every process is asked to save and
    leave, and SystemExit raised with status 143 or 130.
    """
    until = None if seconds is None else time.monotonic() + seconds
    waiting, failures = deque(works), []
    running: dict[subprocess.Popen[bytes], Work] = {}
    with StopSignal() as stop:
        try:
            while not stop.requested:
                while waiting and len(running) < jobs and (until is None or time.monotonic() < until):
                    work = waiting.popleft()
                    say(f"{work.name}: running ({len(waiting)} wait)")
                    running[_start(work)] = work
                if not running:
                    break
                for process in [process for process in running if process.poll() is not None]:
                    work = running.pop(process)
                    failures += _ended(process, work, say)
                    if process.returncode == 0:
                        done(work)
                time.sleep(_WAIT)
        finally:
            _end(running)
        if stop.requested:
            say(f"stopped: {len(running)} saved, {len(waiting)} not started; the same command goes on")
            stop.leave()
    return failures, list(waiting)


def report_failures(failures: Sequence[Failure]) -> None:
    """Raise RunsFailedError if there are any."""
    if failures:
        lines = [f"  {f.work.name}: status {f.status}, {f.reason} (all of it: {f.work.log})" for f in failures]
        raise RunsFailedError(
            f"{len(failures)} run(s) failed, and what depends on them was not started; the same command tries again:\n"
            + "\n".join(lines)
        )


def _start(work: Work) -> subprocess.Popen[bytes]:
    """A session of its own keeps the terminal's Ctrl-C away from it: `run_all` passes it on."""
    work.log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with work.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "difftori.cli", *work.words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads},
            start_new_session=True,
        )


def _ended(process: subprocess.Popen[bytes], work: Work, say: Callable[[str], None]) -> list[Failure]:
    if process.returncode == 0:
        say(f"{work.name}: done")
        return []
    lines = work.log.read_text(errors="replace").split("\n") if work.log.exists() else []
    reason = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    say(f"{work.name}: FAILED with status {process.returncode}: {reason}")
    return [Failure(work, process.returncode, reason)]


def _end(running: dict[subprocess.Popen[bytes], Work]) -> None:
    for process in running:
        process.terminate()
    until = time.monotonic() + _TO_SAVE
    for process in running:
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
