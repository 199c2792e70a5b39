"""The interface of a data format: named keys, their rows block by block, and the ends of the episodes."""

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from difftori.data._filling import Field
from difftori.errors import DataError, MissingExtraError

Entries: TypeAlias = Mapping[str, str | Sequence[str]] | Sequence[str]
"""Maps the name of an entry to the key in the file, or to several keys whose vectors are concatenated. In words: `NAME=KEY`,
`NAME=KEY,KEY`, or `KEY`, which keeps its short name."""


@dataclass(frozen=True)
class Source(ABC):
    """An opened data set. `keys` are all keys of a step, with the file's names; `action` is the usual key of the actions.

    `entries` maps plain names to the keys that are observations. `ends` (E) is the step after the last of each episode.
    `about` is the metadata of the file.
    """

    path: Path
    keys: tuple[str, ...]
    action: str
    entries: dict[str, str]
    ends: np.ndarray
    about: dict[str, Any]

    @property
    def tasks(self) -> dict[str, tuple[int, ...]]:
        """The episodes of each task by its instruction, in the order in which they first occur; empty if none are recorded."""
        return {}

    @abstractmethod
    def field(self, key: str) -> Field:
        """Return the rows of a key, read lazily. Raises DataError, at once or while reading, if they are invalid."""


def plain_names(keys: Mapping[str, str], path: Path) -> dict[str, str]:
    """Map entries to keys, given key → preferred name. Other characters than letters and digits become underscores.

    Keys with the same preferred name are called by their whole key instead.
    Raises DataError if two keys get the same name nevertheless.
    """
    count = Counter(plain_name(preferred) for preferred in keys.values())
    names: dict[str, str] = {}
    for key, preferred in keys.items():
        name = plain_name(preferred)
        name = name if count[name] == 1 else plain_name(key)
        if name in names:
            raise DataError(
                f"{path}: {names[name]!r} and {key!r} would both be called {name!r}. Fix: rename one of them in the file"
            )
        names[name] = key
    return names


def plain_name(text: str) -> str:
    """Return the text as the name of an entry. Other characters than letters and digits become underscores."""
    name = re.sub(r"\W", "_", text)
    return name if name.isidentifier() else f"_{name}"


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises DataError if it cannot be read."""
    try:
        return parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no readable JSON ({error}). Fix: restore the file") from error


def parse_json(text: str, place: str) -> Any:
    """Parse JSON. Raises DataError, naming the place, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: no readable JSON ({error}). Fix: restore the file") from error


def need(module: str) -> Any:
    """Import an optional package. Raises MissingExtraError with the name of the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.partition('.')[0]} cannot be imported ({error}); it is part of the extra `data`. "
            "Fix: pip install 'difftori[data]'"
        ) from error
