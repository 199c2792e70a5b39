import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftori.data._sum_tree import SumTree

MASSES = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


@given(leaves=st.lists(MASSES, min_size=1, max_size=70), seed=st.integers(0, 1000))
def test_find_is_the_running_sum_searched(leaves, seed):
    leaves = np.round(np.array(leaves), 3) * 1024  # sums without rounding
    leaves = np.floor(leaves)
    if leaves.sum() == 0:
        return
    tree = SumTree(len(leaves))
    tree.set(np.arange(len(leaves)), leaves)
    assert tree.total == leaves.sum()
    mass = np.random.default_rng(seed).uniform(0, tree.total, 50)
    mass = np.append(np.floor(mass), [0, tree.total - 1])  # also where one leaf ends and the next begins
    np.testing.assert_array_equal(tree.find(mass), np.searchsorted(np.cumsum(leaves), mass, side="right"))


@given(leaves=st.lists(MASSES, min_size=1, max_size=70))
def test_a_leaf_of_zero_is_never_found_even_at_and_past_the_total(leaves):
    leaves = np.array(leaves)
    if leaves.sum() == 0:
        return
    tree = SumTree(len(leaves))
    tree.fill(leaves)
    mass = np.concatenate([np.cumsum(leaves), [0.0, tree.total, np.nextafter(tree.total, np.inf)]])
    assert (leaves[tree.find(mass)] > 0).all()


@given(
    writes=st.lists(st.tuples(st.integers(0, 36), MASSES), min_size=1, max_size=80),
    batch=st.integers(1, 20),
)
def test_built_by_writes_or_at_once_is_the_same_tree_bit_by_bit(writes, batch):
    index, values = np.array([w[0] for w in writes]), np.array([w[1] for w in writes])
    one, other, plain = SumTree(37), SumTree(37), np.zeros(37)
    for first in range(0, len(index), batch):
        one.set(index[first : first + batch], values[first : first + batch])
        for i, value in zip(index[first : first + batch], values[first : first + batch], strict=True):
            plain[i] = value
    other.fill(plain)
    np.testing.assert_array_equal(one.leaves, plain)
    np.testing.assert_array_equal(one._sums, other._sums)
    assert one.total == pytest.approx(plain.sum())
