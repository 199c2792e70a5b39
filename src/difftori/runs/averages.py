"""Means of what a trainer logs, so that nothing waits for the device before they are read."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from difftori.types import Metrics, Scalar

_NON_FINITE = "non_finite"
_PENDING = 1000
"""Number of additions after which they are read from the device."""


class Averages:
    """Means of named numbers, kept on the device where they are until they are read. Numbers that are not finite are left out.

    `non_finite`: the share of additions with such a number.
    """

    def __init__(self):
        self._pending: list[tuple[tuple[str, ...], Tensor]] = []  # names, and their values followed by `skip`
        self._sums: dict[str, tuple[float, int]] = {}  # sum and count by name

    def add(self, metrics: Mapping[str, Tensor | float], skip: Scalar | None = None) -> None:
        """Add one value for each name, unless `skip` is 1."""
        if not metrics:
            return
        values = [torch.as_tensor(value).detach().reshape(()) for value in metrics.values()]
        skipped = values[0].new_zeros(()) if skip is None else skip
        self._pending.append((tuple(metrics), torch.stack([*values, skipped])))
        if len(self._pending) >= _PENDING:
            self._collect()

    def read(self) -> Metrics:
        """Return the means, and begin anew."""
        self._collect()
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums = {}
        return means

    def state(self) -> dict[str, list[float]]:
        """The sums and counts, for a checkpoint."""
        self._collect()
        return {name: [total, float(count)] for name, (total, count) in self._sums.items()}

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Restore them."""
        self._pending = []
        self._sums = {name: (total, int(count)) for name, (total, count) in state.items()}

    def _collect(self) -> None:
        """Read what was added, in one transfer, and sum it one after another, so that a sum does not depend on when it is read."""
        if not self._pending:
            return
        numbers = iter(torch.cat([values.double() for _, values in self._pending]).tolist())
        for names, _ in self._pending:
            added = {name: next(numbers) for name in names}
            if next(numbers):
                continue
            broken = not all(map(math.isfinite, added.values()))
            for name, value in {**added, _NON_FINITE: float(broken)}.items():
                self._add(name, value)
        self._pending = []

    def _add(self, name: str, value: float) -> None:
        finite = math.isfinite(value)
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value if finite else total), count + finite
