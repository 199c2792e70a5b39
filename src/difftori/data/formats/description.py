"""Describes the content of a data set: its episodes and its keys."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from difftori.data.formats._keys import action_key, default_entries
from difftori.data.formats._source import Source


@final
@dataclass(frozen=True)
class KeyDescription:
    """One key: its name in training, the shape of a step, and the range of each of its dimensions.

    `name` is None for keys that are read only if `--obs-keys` names them; their `shape` is not looked up. `low` and `high` are None for
    images and other arrays, whose values are not read.
    """

    key: str
    name: str | None
    shape: tuple[int, ...] | None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None


@final
@dataclass(frozen=True)
class DemosDescription:
    """A data set: the number of steps of each episode, its keys, the metadata of the file, such as `fps`, and the episodes of each task."""

    path: Path
    lengths: tuple[int, ...]
    keys: tuple[KeyDescription, ...]
    about: Mapping[str, Any]
    tasks: Mapping[str, tuple[int, ...]]

    def title(self) -> str:
        """Return a line with the path, the numbers of episodes and steps, and the short entries of the metadata."""
        sizes = (
            f"{len(self.lengths)} episodes, {sum(self.lengths)} steps, {min(self.lengths)} to {max(self.lengths)} each"
        )
        about = [f"{name} {value}" for name, value in self.about.items() if isinstance(value, int | float | str)]
        return ", ".join([f"{self.path}: {sizes}", *(word for word in about if len(word) < 40)])

    def table(self) -> list[dict[str, Any]]:
        """Return one row for each key. Ranges of many dimensions are summarised."""
        return [
            {
                "key": key.key,
                "name": key.name,
                "shape": key.shape,
                "least": _numbers(key.low, min),
                "greatest": _numbers(key.high, max),
            }
            for key in self.keys
        ]

    def task_table(self) -> list[dict[str, Any]]:
        """Return one row for each task: its instruction, the number of its episodes, and their numbers."""
        return [
            {"task": task, "episodes": len(episodes), "numbers": _ranges(episodes)}
            for task, episodes in self.tasks.items()
        ]


def describe(source: Source) -> DemosDescription:
    """Describe an opened data set. Numbers are read, images and videos are not.

    Raises DataError if there are no actions, and for numbers that cannot be read.
    """
    action = action_key(source, None)
    names = {key: name for name, key in default_entries(source, action).items()} | {action: "action"}
    lengths = tuple(np.diff(source.ends, prepend=0).tolist())
    keys = tuple(_described(source, key, names.get(key)) for key in source.keys)
    return DemosDescription(source.path, lengths, keys, source.about, source.tasks)


_SHOWN = 8
"""The ranges of more dimensions are shown as one."""


def _numbers(values: tuple[float, ...] | None, worst: Callable[[Sequence[float]], float]) -> str | None:
    """Return the numbers of all dimensions as text, or of many only the `worst`; NaN if any is."""
    if values is None:
        return None
    if any(map(math.isnan, values)):
        return "nan"
    return " ".join(f"{value:.4g}" for value in (values if len(values) <= _SHOWN else [worst(values)]))


def _ranges(numbers: tuple[int, ...]) -> str:
    """Return increasing numbers as `--episodes` reads them: `0:50 60`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return " ".join(str(low) if high == low + 1 else f"{low}:{high}" for low, high in runs)


def _described(source: Source, key: str, name: str | None) -> KeyDescription:
    if name is None:
        return KeyDescription(key, name, None)
    field = source.field(key)
    if len(field.shape) > 1:
        return KeyDescription(key, name, field.shape)
    blocks = [block.reshape(len(block), -1) for block in field.blocks if block.size]
    low = np.min([block.min(0) for block in blocks], axis=0)  # unlike Python's, NaN if any number is NaN
    high = np.max([block.max(0) for block in blocks], axis=0)
    return KeyDescription(key, name, field.shape, tuple(low.tolist()), tuple(high.tolist()))
