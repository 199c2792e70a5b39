"""One process at a time in a directory."""

import time
from pathlib import Path
from typing import IO

_TRIES, _PAUSE = 10, 0.02


def hold(lock: IO[str]) -> None:
    """Keep other processes out until the file closes, which the system does for a process that ends.

    Raises BlockingIOError if another holds it, and not only looks whether it is held. Windows has no flock; there two
    processes in one place are the user's care.
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
    """Whether a process holds the file, which need not be there."""
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
