"""Writes a folder atomically: it exists completely or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from difftori.errors import DataError


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`. It is renamed to `path` at the end, and deleted if anything fails.

    Raises DataError if `path` exists, or if something cannot be written.
    """
    if path.exists():
        raise DataError(f"{path}: already exists. Fix: remove it or choose another location")
    partial = path.with_name(f"{path.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}). Fix: free space, or choose another location") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
