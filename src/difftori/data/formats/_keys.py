"""Chooses the keys and the episodes to read: by convention, or as given by the user."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from difftori.data.formats._source import Entries, Source, plain_name
from difftori.data.trajectories import is_entry_name
from difftori.errors import DataError

_CAMERAS = ("image", "images", "img", "rgb", "pixels")
"""Names of the only camera."""
_CAMERA_ENDS = ("_image", "_img", "_rgb", "_pixels")
_ACTIONS = ("action", "actions")
_ACTION_WANTED = ("the actions are", "--action-key KEY (in Python `action`)")


def default_entries(source: Source, action: str) -> dict[str, str]:
    """Return the observations by name, without the actions, which are the key `action`."""
    return {name: key for name, key in source.entries.items() if key != action}


def chosen_entries(source: Source, entries: Entries | None, action: str) -> dict[str, tuple[str, ...]]:
    """Return the keys of each entry, as the file writes them. See `read_demos` for `entries`; None: all observations but `action`.

    Raises DataError for a key that does not exist, and for a name that cannot be used.
    """
    if entries is None:
        usual = default_entries(source, action)
        if not usual:
            raise DataError(
                f"{source.path}: no observations are found by name; there are {listing(source)}. "
                "Fix: name the keys, --obs-keys NAME=KEY … (in Python `entries`)"
            )
        return {name: (key,) for name, key in usual.items()}
    if isinstance(entries, Mapping):
        given = [(name, (keys,) if isinstance(keys, str) else tuple(keys)) for name, keys in entries.items()]
    else:
        given = [_parsed(source, word) for word in entries]
    if not given:
        raise DataError(f"{source.path}: no observations are chosen. Fix: name at least one key")
    chosen: dict[str, tuple[str, ...]] = {}
    for name, keys in given:
        if name in chosen or not is_entry_name(name):
            what = "is given twice" if name in chosen else "cannot name an observation"
            raise DataError(
                f"{source.path}: {name!r} {what}. Fix: use another name of letters, digits and underscores, NAME=KEY"
            )
        wanted = f"{name} is", f"--obs-keys {name}=KEY (in Python `entries`)"
        chosen[name] = tuple(_found(source, key, wanted) for key in keys or ("",))
    return chosen


def action_key(source: Source, action: str | None) -> str:
    """Return the key of the actions. Raises DataError if it does not exist."""
    if action is None:
        action = next((name for name in (source.action, *_ACTIONS) if name in source.keys), source.action)
    return _found(source, action, _ACTION_WANTED)


def listing(source: Source) -> str:
    """List all keys with the shape of a step, for messages."""
    return ", ".join(f"{key} {_shape(source, key)}" for key in source.keys) or "no keys"


def chosen_episodes(words: Sequence[str | int], count: int, place: str) -> list[int]:
    """Return the episodes that the words name, such as `0:50` and `60`, in increasing order.

    A range has the form FIRST:END, without END, as in Python; either may be omitted. Raises DataError for an episode that does
    not exist.
    """
    chosen: set[int] = set()
    for word in [words] if isinstance(words, str) else words:
        match = re.fullmatch(r"(\d*):(\d*)|(\d+)", str(word))
        if match is None:
            raise DataError(f"{place}: {word!r} names no episodes. Fix: give numbers and ranges, such as 0:50 60")
        first, end, single = match.groups()
        low = int(single if single is not None else first or 0)
        high = low + 1 if single is not None else int(end or count)
        if not 0 <= low < high <= count:
            raise DataError(
                f"{place}: there are no episodes {word}; the data set has {count}, from 0 to {count - 1}. Fix: choose some of these"
            )
        chosen.update(range(low, high))
    if not chosen:
        raise DataError(f"{place}: no episodes are chosen. Fix: give numbers and ranges, such as 0:50 60")
    return sorted(chosen)


def episodes_of(source: Source, task: str, kept: Sequence[int] | None) -> list[int]:
    """Return the episodes of a task, of those that are kept (default: all). Raises DataError if there are none."""
    if task not in source.tasks:
        raise DataError(
            f"{source.path}: no task {task!r}. Fix: choose from {', '.join(map(repr, list(source.tasks)[:20]))}, or give episodes by number"
        )
    found = [episode for episode in source.tasks[task] if kept is None or episode in kept]
    if not found:
        raise DataError(f"{source.path}: none of the chosen episodes is of the task {task!r}. Fix: choose others")
    return found


def _parsed(source: Source, word: str) -> tuple[str, tuple[str, ...]]:
    """Return the name and the keys of a word `NAME=KEY`, `NAME=KEY,KEY` or `KEY`. A key alone keeps its short name."""
    name, sign, keys = word.partition("=")
    if sign:
        return name, tuple(keys.split(","))
    key = find_key(source, word)
    short = next((name for name, known in source.entries.items() if known == key), None)
    return short or plain_name(word.rpartition("/")[2].rpartition(".")[2]), (word,)


def find_key(source: Source, name: str) -> str | None:
    """Return the key that a name refers to: itself, the key with that short name, or the only camera. None: there is none."""
    if name in source.keys:
        return name
    if name in source.entries:
        return source.entries[name]
    if name in _CAMERAS:
        cameras = [key for short, key in source.entries.items() if _is_camera(short, key)]
        return cameras[0] if len(cameras) == 1 else None
    return None


def _is_camera(short: str, key: str) -> bool:
    return short in _CAMERAS or short.endswith(_CAMERA_ENDS) or key.startswith("observation.images.")


def _found(source: Source, name: str, wanted: tuple[str, str]) -> str:
    key = find_key(source, name)
    if key is None:
        raise DataError(
            f"{source.path}: {wanted[0]} to be read from {name!r}, which does not exist; there are {listing(source)}"
            f"{_recorded_in(source.about)}. Fix: choose one of these, {wanted[1]}"
        )
    return key


def _recorded_in(about: Mapping[str, Any]) -> str:
    """Return the environment and the observation type of a data set that `difftori collect` wrote, as text."""
    if not isinstance(about.get("env"), str) or not isinstance(about.get("obs"), str):
        return ""
    return (
        f". They were recorded in {about['env']} with --obs {about['obs']}, so check --env and --obs, or collect others"
    )


def _shape(source: Source, key: str) -> str:
    try:
        shape = source.field(key).shape
    except DataError:
        return "(unreadable)"
    return f"({', '.join(map(str, shape or (1,)))})"
