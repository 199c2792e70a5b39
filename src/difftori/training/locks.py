"""One process at a time in a directory."""

from typing import IO


def hold(lock: IO[str]) -> None:
    """Keep other processes out until the file closes, which the system does for a process that ends.

    Raises BlockingIOError if another holds it. Windows has no flock; there two processes in one place are the user's care.
    """
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
