"""Describes the content of a data set: its episodes and its keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from difftori.data.formats._keys import action_key, default_entries
from difftori.data.formats._source import Source


@final
@dataclass(frozen=True)
class KeyDescription:
    """One key: its name in training, the shape of a step, and the range of its values.

    `name` is None for keys that are read only if `--obs-keys` names them; their `shape` is not looked up. `low` and `high` are None for
    images and other arrays, whose values are not read.
    """

    key: str
    name: str | None
    shape: tuple[int, ...] | None
    low: float | None = None
    high: float | None = None


@final
@dataclass(frozen=True)
class DemosDescription:
    """A data set: the number of steps of each episode, its keys, and the metadata of the file, such as `fps`."""

    path: Path
    lengths: tuple[int, ...]
    keys: tuple[KeyDescription, ...]
    about: Mapping[str, Any]

    def title(self) -> str:
        """Return a line with the path, the numbers of episodes and steps, and the short entries of the metadata."""
        sizes = (
            f"{len(self.lengths)} episodes, {sum(self.lengths)} steps, {min(self.lengths)} to {max(self.lengths)} each"
        )
        about = [f"{name} {value}" for name, value in self.about.items() if isinstance(value, int | float | str)]
        return ", ".join([f"{self.path}: {sizes}", *(word for word in about if len(word) < 40)])

    def table(self) -> list[dict[str, Any]]:
        """Return one row for each key."""
        return [
            {"key": key.key, "name": key.name, "shape": key.shape, "least": key.low, "greatest": key.high}
            for key in self.keys
        ]


def describe(source: Source) -> DemosDescription:
    """Describe an opened data set. Numbers are read, images and videos are not.

    Raises DataError if there are no actions, and for numbers that cannot be read.
    """
    action = action_key(source, None)
    names = {key: name for name, key in default_entries(source, action).items()} | {action: "action"}
    lengths = tuple(np.diff(source.ends, prepend=0).tolist())
    keys = tuple(_described(source, key, names.get(key)) for key in source.keys)
    return DemosDescription(source.path, lengths, keys, source.about)


def _described(source: Source, key: str, name: str | None) -> KeyDescription:
    if name is None:
        return KeyDescription(key, name, None)
    field = source.field(key)
    if len(field.shape) > 1:
        return KeyDescription(key, name, field.shape)
    limits = np.array([(block.min(), block.max()) for block in field.blocks if block.size], dtype=float)
    low, high = limits[:, 0].min(), limits[:, 1].max()  # unlike Python's, NaN if any number is NaN
    return KeyDescription(key, name, field.shape, float(low), float(high))
