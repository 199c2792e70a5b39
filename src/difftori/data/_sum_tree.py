"""A binary tree of sums: samples in proportion to priorities, in O(log n), for a whole batch at once."""

from typing import final

import numpy as np
from jaxtyping import Float, Int


@final
class SumTree:
    """A tree with `size` non-negative leaves, initially 0. Each inner node holds the sum of its two children.

    A node is always recomputed from its children, never incremented. Rounding errors therefore do not accumulate, and a
    tree rebuilt from the same leaves is identical to the last bit.
    """

    def __init__(self, size: int):
        self._depth = (size - 1).bit_length()
        self._width = 1 << self._depth
        self._sums = np.zeros(2 * self._width)
        self.leaves = self._sums[self._width : self._width + size]
        """The leaves (size), to read. Write them with `set` or `fill`."""

    @property
    def total(self) -> float:
        """The sum of all leaves."""
        return float(self._sums[1])

    def set(self, index: Int[np.ndarray, "B"], values: Float[np.ndarray, "B"] | float) -> None:
        """Write leaves and update the sums above them. If an index occurs twice, its last value is used."""
        node = index.astype(np.int64) + self._width
        self._sums[node] = values
        left = np.empty_like(node)
        for _ in range(self._depth):
            node >>= 1
            np.left_shift(node, 1, out=left)
            total = self._sums.take(left)
            left += 1
            total += self._sums.take(left)
            self._sums[node] = total

    def fill(self, leaves: Float[np.ndarray, "size"]) -> None:
        """Write all leaves."""
        self.leaves[:] = leaves
        level = self._width
        while level > 1:
            half = level >> 1
            np.add(self._sums[level : 2 * level : 2], self._sums[level + 1 : 2 * level : 2], out=self._sums[half:level])
            level = half

    def find(self, mass: Float[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
        """Return for each mass in [0, total) the leaf at which the cumulative sum of the leaves exceeds it.

        The total must be above 0. A leaf of 0 is never returned.
        """
        node = np.ones(len(mass), dtype=np.int64)
        rest = mass.copy()
        for _ in range(self._depth):
            node <<= 1
            left = self._sums.take(node)
            right = rest >= left
            left *= right
            rest -= left
            node += right
        # Rounding can push a mass past the last positive leaf of a branch. This is rare, so only those rows are repeated.
        stray = self._sums.take(node) == 0
        if stray.any():
            node[stray] = self._find_positive(mass[stray])
        return node - self._width

    def _find_positive(self, mass: Float[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
        """Like `find`, but never enters a branch whose sum is 0."""
        node = np.ones(len(mass), dtype=np.int64)
        rest = mass.copy()
        for _ in range(self._depth):
            node <<= 1
            left = self._sums[node]
            right = (rest >= left) & (self._sums[node + 1] > 0)
            rest -= left * right
            node += right
        return node
