"""A polite end: SIGTERM, SIGINT and SIGUSR2 set a flag that a loop looks at, saves, and leaves by."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

_TIME_IS_UP = (signal.SIGUSR2,) if hasattr(signal, "SIGUSR2") else ()
"""What Slurm sends, as submitit asks it to, to every process of a job whose time is nearly up."""

_log = logging.getLogger(__name__)


class StopSignal:
    """A context in which SIGTERM, SIGINT and SIGUSR2 only set `requested`; on leaving it the former handlers are back.

    A second SIGINT acts as it did before, for whoever will not wait. Outside the main thread Python hands out no
    signals, and the context does nothing.
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
        """Whether the loop is asked to save and leave."""
        return self.received is not None

    def leave(self) -> NoReturn:
        """End the process as a signal does: exit status 128 + its number, 143 for SIGTERM and 130 for SIGINT."""
        raise SystemExit(128 + (self.received or signal.SIGTERM))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._former[signal.SIGINT])
        _log.warning("%s: saving a checkpoint, then leaving", self.received.name)
