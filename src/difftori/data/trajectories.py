"""Demonstrations as whole episodes: named observations and actions, step after step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from difftori.data._filling import Field, TensorWriter, checked_ends
from difftori.errors import DataError

RESERVED = ("action",)
"""Names that observation entries cannot have, because files store the actions under them."""


def is_entry_name(name: str) -> bool:
    """Return whether an observation may have this name: an identifier that is not in `RESERVED`."""
    return name.isidentifier() and name not in RESERVED


@final
@dataclass(frozen=True)
class Trajectories:
    """E episodes in the task's own units, stored as T steps: `obs` maps names to (T …), `actions` (T A).

    Observation t is the one before action t. An entry is float32, such as `state` (T S) or `point_cloud` (T N 3), or uint8,
    such as `image` (T height width C). `spans` (E 2) are the first step of each episode and the step after its last.
    Steps outside of all spans are ignored, so several sets can share one storage, which may be a memory-mapped file.
    `about` is the metadata of the file, in plain JSON values. `tasks` has the number of episodes of each task, by its instruction, if
    they were read from a file with several.

    Raises DataError if shapes, dtypes or devices do not match. `of` creates a set from arrays and checks the numbers
    too; `difftori.data.formats.read_demos` reads one from files.
    """

    # Plain types: the content of files is always checked here, not only under the tests' shape checker.
    obs: dict[str, Tensor]
    actions: Tensor
    spans: Tensor
    about: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        steps = len(self.actions)
        if self.actions.ndim != 2 or self.actions.dtype != torch.float32:
            raise DataError(
                f"trajectories: actions are {self.actions.dtype} of shape {tuple(self.actions.shape)}; they must be "
                "float32 (T A)"
            )
        if not self.obs:
            raise DataError("trajectories: there are no observations. Fix: name at least one entry")
        for name, values in self.obs.items():
            if not is_entry_name(name):
                raise DataError(
                    f"trajectories: {name!r} cannot name an entry. Fix: use letters, digits and underscores, a letter first, "
                    f"and not {' or '.join(RESERVED)}"
                )
            if values.ndim < 2 or len(values) != steps or values.dtype not in (torch.float32, torch.uint8):
                raise DataError(
                    f"trajectories: the entry {name!r} is {values.dtype} of shape {tuple(values.shape)}; it must be float32 "
                    f"or uint8 ({steps} …), as there are {steps} actions"
                )
            if values.device != self.actions.device:
                raise DataError(
                    f"trajectories: the entry {name!r} is on {values.device} and the actions on {self.actions.device}. "
                    "Fix: move them to one device"
                )
        spans = self.spans
        if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype != torch.int64 or len(spans) == 0:
            raise DataError(
                f"trajectories: spans are {spans.dtype} of shape {tuple(spans.shape)}; they must be int64 (E 2), for at "
                "least one episode"
            )
        wrong = (spans[:, 0] < 0) | (spans[:, 0] >= spans[:, 1]) | (spans[:, 1] > steps)
        if wrong.any():
            episode = int(wrong.nonzero()[0])
            raise DataError(
                f"trajectories: episode {episode} has the span [{int(spans[episode, 0])}, {int(spans[episode, 1])}); it must "
                f"have at least one step and lie within the {steps} stored steps"
            )

    @staticmethod
    def of(
        obs: Mapping[str, Any], actions: Any, ends: Sequence[int] | np.ndarray, about: Mapping[str, Any] | None = None
    ) -> "Trajectories":
        """Create a set from copies of arrays or tensors (T …). `ends` (E) is the step after the last of each episode.

        Dtypes are converted as by `read_demos`. Raises DataError if `ends` do not increase or do not match the arrays, and
        for NaN or Inf, naming the episode.
        """
        place = "trajectories"
        writer = TensorWriter.of(checked_ends(ends, place))

        def fill(name: str, values: Any) -> Tensor:
            if isinstance(values, Tensor):
                values = (values.float() if values.is_floating_point() else values).detach().cpu()
            array = np.asarray(values)
            return writer.fill([Field(f"{place}: {name}", array.shape[1:], iter([array] if array.ndim else []))])

        entries = {name: fill(name, values) for name, values in obs.items()}
        return Trajectories(entries, fill("actions", actions), make_spans(writer.ends), dict(about or {}))

    def __len__(self) -> int:
        """Number of episodes E."""
        return len(self.spans)

    @property
    def lengths(self) -> list[int]:
        """Number of steps of each episode."""
        return (self.spans[:, 1] - self.spans[:, 0]).tolist()

    def episode(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return one episode as views: its observations (L …) by name and its actions (L A)."""
        start, stop = self.spans[number].tolist()
        return {name: values[start:stop] for name, values in self.obs.items()}, self.actions[start:stop]

    def rows(self) -> Tensor:
        """Return the storage index of every step of every episode, in order."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.spans.tolist()])

    def blocks(self, values: Tensor, numbers: int = 2**22) -> Iterator[Tensor]:
        """Iterate over the steps of all episodes in order, for `values` an entry or the actions.

        A block has about `numbers` values.
        """
        rows = self.rows().to(values.device)
        for chosen in rows.split(max(1, numbers // max(1, values[0].numel()))):
            yield values[chosen]

    def select(self, episodes: Sequence[int]) -> "Trajectories":
        """Return these episodes, in this order, with shared storage. Raises DataError if an episode does not exist."""
        wrong = [number for number in episodes if not 0 <= number < len(self)]
        if wrong or len(episodes) == 0:
            raise DataError(
                f"trajectories: no episode {wrong[0] if wrong else '(an empty list was passed)'}. "
                f"Fix: choose from 0 to {len(self) - 1}"
            )
        return replace(self, spans=self.spans[torch.tensor(list(episodes))])

    def split(self, validation: float, generator: torch.Generator) -> tuple["Trajectories", "Trajectories"]:
        """Split by whole episodes into a training and a validation set, with shared storage.

        round(E·`validation`) episodes are sampled for validation, at least one, and at least one remains for training. Both
        sets preserve the order. `generator` is a CPU generator. Raises DataError if there is only one episode, or
        `validation` is not between 0 and 1.
        """
        if not 0 < validation < 1 or len(self) < 2:
            raise DataError(
                f"trajectories: a share of {validation} of {len(self)} episodes cannot be split off; the share must be "
                "between 0 and 1, and there must be two episodes or more"
            )
        count = min(max(1, round(len(self) * validation)), len(self) - 1)
        order = torch.randperm(len(self), generator=generator).tolist()
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

    @staticmethod
    def join(parts: Sequence["Trajectories"]) -> "Trajectories":
        """Copy all episodes of all parts into one set. `about` is taken from the first part.

        Raises DataError if entries, their shapes or their dtypes differ.
        """
        if not parts:
            raise DataError("trajectories: there is nothing to join. Fix: pass at least one set")
        shapes = [part.shapes for part in parts]
        different = next((number for number, one in enumerate(shapes) if one != shapes[0]), None)
        if different is not None:
            raise DataError(
                f"trajectories: part {different} has {shapes[different]}, and part 0 {shapes[0]}. Fix: join sets of the same "
                "entries only"
            )
        ends = np.cumsum([length for part in parts for length in part.lengths])
        rows = [part.rows().to(part.actions.device) for part in parts]
        obs = {
            name: torch.cat([part.obs[name][chosen] for part, chosen in zip(parts, rows, strict=True)])
            for name in parts[0].obs
        }
        actions = torch.cat([part.actions[chosen] for part, chosen in zip(parts, rows, strict=True)])
        return Trajectories(obs, actions, make_spans(ends), parts[0].about)

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of one step of each entry and of `action`."""
        entries = {**self.obs, "action": self.actions}
        return {name: (values.dtype, tuple(values.shape[1:])) for name, values in entries.items()}


def make_spans(ends: np.ndarray) -> Tensor:
    """Return the spans (E 2) of consecutive episodes that end at `ends` (E)."""
    stops = torch.from_numpy(np.asarray(ends, dtype=np.int64))
    return torch.stack([torch.cat([stops.new_zeros(1), stops[:-1]]), stops], 1)
