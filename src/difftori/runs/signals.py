"""Graceful stop: SIGTERM, SIGINT and SIGUSR2 set a flag; the training loop checks it, saves and exits."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

_TIME_IS_UP = (signal.SIGUSR2,) if hasattr(signal, "SIGUSR2") else ()
"""The signal that Slurm, started by submitit, sends to every process of a job shortly before the time limit."""

_log = logging.getLogger(__name__)


class StopSignal:
    """A context manager in which SIGTERM, SIGINT and SIGUSR2 only set `requested`. It restores the handlers at the end.

    A second SIGINT has its previous effect, so it ends the process immediately. Outside the main thread Python delivers no
    signals, and the context manager does nothing.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, *_TIME_IS_UP):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether the loop should save and exit."""
        return self.received is not None

    def leave(self) -> NoReturn:
        """End the process with exit code 128 + the number of the signal: 143 for SIGTERM, 130 for SIGINT."""
        raise SystemExit(128 + (self.received or signal.SIGTERM))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._former[signal.SIGINT])
        _log.warning("%s: saving a checkpoint, then exiting", self.received.name)
