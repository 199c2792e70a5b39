"""File locks that allow one process at a time in a directory."""

import time
from pathlib import Path
from typing import IO

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


def is_held(lock: Path) -> bool:
    """Return whether a process holds the lock. The file may be absent."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with lock.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
