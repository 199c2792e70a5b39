"""What every format gives: named keys, their rows block by block, and where episodes end."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from difftori.data._filling import Part, Room
from difftori.data.trajectories import Trajectories, make_spans
from difftori.errors import DataError, MissingExtraError

Entries: TypeAlias = Mapping[str, str | Sequence[str]]
"""Name of an entry → the key in the file that it is read from, or several whose vectors are put side by side."""


@dataclass(frozen=True)
class Source(ABC):
    """An opened data set. `keys` are all that a step holds, as the file calls them; `action` is the usual one of actions.

    `entries` are the observations among the keys under plain names. `ends` (E) is the step after the last of each
    episode, `about` what the file says of itself.
    """

    path: Path
    keys: tuple[str, ...]
    action: str
    entries: dict[str, str]
    ends: np.ndarray
    about: dict[str, Any]

    @abstractmethod
    def part(self, key: str) -> Part:
        """The rows of a key, read as they are asked for. Raises DataError, at once or while reading, if it is no good."""


def load(source: Source, entries: Entries | None, action: str | None, room: Room) -> Trajectories:
    """Read the chosen entries and the actions. Raises DataError naming the file, the key and what is wrong."""
    entries = source.entries if entries is None else entries
    chosen = {name: (keys,) if isinstance(keys, str) else tuple(keys) for name, keys in entries.items()}
    action = action or source.action
    for name, keys in {**chosen, "action": (action,)}.items():
        missing = [key for key in keys if key not in source.keys]
        if missing or not keys:
            raise DataError(
                f"{source.path}: {name} is to be read from {missing[0] if missing else 'no key'!r}, which is not there; "
                f"there are {', '.join(source.keys)}"
            )
    if not chosen:
        raise DataError(f"{source.path}: no observations beside {action!r}; name what to read in `entries`")
    obs = {name: room.fill([source.part(key) for key in keys]) for name, keys in chosen.items()}
    part = source.part(action)
    if len(part.shape) > 1:
        raise DataError(f"{part.place}: an action has the shape {part.shape}; actions must be (T A)")
    return Trajectories(obs, room.fill([part]), make_spans(source.ends), source.about)


def plain_names(keys: Mapping[str, str], path: Path) -> dict[str, str]:
    """Entry → key, from key → wished name; what is not a letter, digit or underscore becomes one.

    Raises DataError if two keys get the same name.
    """
    names: dict[str, str] = {}
    for key, wished in keys.items():
        name = re.sub(r"\W", "_", wished)
        name = name if name.isidentifier() else f"_{name}"
        if name in names:
            raise DataError(
                f"{path}: {names[name]!r} and {key!r} would both be called {name!r}; name them in `entries`"
            )
        names[name] = key
    return names


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no readable JSON ({error}); restore the file") from error


def need(module: str) -> Any:
    """An optional package. Raises MissingExtraError naming the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.partition('.')[0]} cannot be imported ({error}); it comes with the extra `data`: "
            "pip install 'difftori[data]'"
        ) from error
