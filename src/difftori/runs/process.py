"""The process of a run: its lock on the directory, the signals that stop it, and the software and machine it runs on."""

import contextlib
import itertools
import logging
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, NoReturn

import numpy as np
import torch

import difftori

_TRIES, _PAUSE = 10, 0.02


def hold(lock: IO[str]) -> None:
    """Lock the file until it is closed. The system closes it when the process ends.

    Retries briefly, because `is_held` in another process locks the file for a moment; then raises BlockingIOError if another
    process holds the lock. Windows has no flock; there the caller must avoid two processes in one directory.
    """
    try:
        import fcntl
    except ImportError:
        return None
    for left in reversed(range(_TRIES)):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(_PAUSE)
    return None


def wait_for(file: IO[Any]) -> None:
    """Lock the file until it is closed, as soon as no other process holds the lock. Without flock, as on Windows, nothing is locked."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def is_held(lock: Path) -> bool:
    """Return whether a process holds the lock. The file may be absent."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with lock.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def removed_on_error(path: Path, keep: Callable[[], bool]) -> Iterator[None]:
    """Remove a folder that did not exist before, with its new parents, if an exception ends the block and `keep` returns False."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        yield
    except Exception:
        if existing != path and not keep():
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # a parent that another process writes to
                for parent in itertools.takewhile(lambda place: place != existing, path.absolute().parents):
                    parent.rmdir()
        raise


_TIME_IS_UP = (signal.SIGUSR2,) if hasattr(signal, "SIGUSR2") else ()
"""The signal that Slurm, started by submitit, sends to every process of a job shortly before the time limit."""
_TERMINAL_CLOSED = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()

_log = logging.getLogger(__name__)


class StopRequested(Exception):
    """Raised by `StopSignal.check`, to end an evaluation. The trainer saves a checkpoint and leaves."""


class StopSignal:
    """A context manager in which SIGTERM, SIGINT, SIGUSR2 and SIGHUP only set `requested`. It restores the handlers at the end.

    SIGHUP, of a closed terminal, stays ignored where it is, as under `nohup`. A second SIGINT has its previous effect, so it ends
    the process immediately. Outside the main thread Python delivers no signals, and the context manager does nothing.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            closed = [number for number in _TERMINAL_CLOSED if signal.getsignal(number) != signal.SIG_IGN]
            for number in (signal.SIGTERM, signal.SIGINT, *_TIME_IS_UP, *closed):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether the loop should save and exit."""
        return self.received is not None

    def check(self) -> None:
        """Raise `StopRequested` if a signal was received."""
        if self.requested:
            raise StopRequested

    def leave(self) -> NoReturn:
        """End the process with exit code 128 + the number of the signal: 143 for SIGTERM, 130 for SIGINT."""
        raise SystemExit(128 + (self.received or signal.SIGTERM))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._former[signal.SIGINT])
        _log.warning("%s: saving a checkpoint, then exiting. Re-run the same command to resume", self.received.name)


_SIMULATORS = ("mujoco", "dm_control", "metaworld", "gym_pusht", "pymunk", "gymnasium")


def versions(device: str) -> dict[str, str | int | None]:
    """Return versions, machine and source of this process, for `versions.json`."""
    return {
        "difftori": difftori.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: version for name in _SIMULATORS if (version := _installed(name)) is not None},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "executable": sys.executable,
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the name of the processor, as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the git commit of the package's checkout, with `-dirty` if files differ, or None if it is installed."""
    folder = Path(difftori.__file__).parent
    git = shutil.which("git")
    if git is None or folder.parent.name in ("site-packages", "dist-packages"):
        return None
    try:
        answer = subprocess.run(
            [git, "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
