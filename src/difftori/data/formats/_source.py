"""The interface of a data format: named keys, their rows block by block, and the ends of the episodes."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from difftori.data._filling import Field, TensorWriter
from difftori.data.trajectories import Trajectories, make_spans
from difftori.errors import DataError, MissingExtraError

Entries: TypeAlias = Mapping[str, str | Sequence[str]]
"""Maps the name of an entry to the key in the file, or to several keys whose vectors are concatenated."""


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

    @abstractmethod
    def field(self, key: str) -> Field:
        """Return the rows of a key, read lazily. Raises DataError, at once or while reading, if they are invalid."""


def load(source: Source, entries: Entries | None, action: str | None, writer: TensorWriter) -> Trajectories:
    """Read the selected entries and the actions. Raises DataError with the file, the key and what is wrong."""
    entries = source.entries if entries is None else entries
    chosen = {name: (keys,) if isinstance(keys, str) else tuple(keys) for name, keys in entries.items()}
    action = action or source.action
    for name, keys in {**chosen, "action": (action,)}.items():
        missing = [key for key in keys if key not in source.keys]
        if missing or not keys:
            raise DataError(
                f"{source.path}: {name} is to be read from {missing[0] if missing else 'no key'!r}, which does not exist. "
                f"Fix: choose from {', '.join(source.keys)}"
            )
    if not chosen:
        raise DataError(f"{source.path}: no observations besides {action!r}. Fix: name the keys to read in `entries`")
    obs = {name: writer.fill([source.field(key) for key in keys]) for name, keys in chosen.items()}
    part = source.field(action)
    if len(part.shape) > 1:
        raise DataError(f"{part.place}: an action has the shape {part.shape}; actions must be (T A)")
    return Trajectories(obs, writer.fill([part]), make_spans(source.ends), source.about)


def plain_names(keys: Mapping[str, str], path: Path) -> dict[str, str]:
    """Map entries to keys, given key → preferred name. Other characters than letters and digits become underscores.

    Raises DataError if two keys get the same name.
    """
    names: dict[str, str] = {}
    for key, preferred in keys.items():
        name = re.sub(r"\W", "_", preferred)
        name = name if name.isidentifier() else f"_{name}"
        if name in names:
            raise DataError(
                f"{path}: {names[name]!r} and {key!r} would both be called {name!r}. Fix: name them in `entries`"
            )
        names[name] = key
    return names


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises DataError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no readable JSON ({error}). Fix: restore the file") from error


def need(module: str) -> Any:
    """Import an optional package. Raises MissingExtraError with the name of the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.partition('.')[0]} cannot be imported ({error}); it is part of the extra `data`. "
            "Fix: pip install 'difftori[data]'"
        ) from error
