"""Folders that are there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from difftori.errors import DataError


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write into; it takes that name when all is written, and is gone if anything fails.

    Raises DataError if `path` exists, or if something cannot be written.
    """
    if path.exists():
        raise DataError(f"{path}: is there already; remove it or choose another place")
    partial = path.with_name(f"{path.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); free space or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
