"""The shuffle without an index: a bijection, keyed, the same on every machine and for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_train.data.permutation import Permutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_every_element_exactly_once(size, key):
    assert sorted(Permutation(size, key).array().tolist()) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 2**62), key=st.integers(0, 2**63), data=st.data())
def test_single_elements_equal_the_array_and_stay_in_range(size, key, data):
    permutation = Permutation(size, key)
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=20, unique=True))
    elements = [permutation[i] for i in positions]
    assert len(set(elements)) == len(positions)
    assert all(0 <= element < size for element in elements)
    if size <= 5000:
        assert permutation.array()[positions].tolist() == elements


def test_array_equals_elements():
    for size in (1, 2, 3, 7, 64, 65, 1000):
        permutation = Permutation(size, "key", size)
        assert permutation.array().tolist() == [permutation[i] for i in range(size)]


def test_order_is_pinned():
    # A change here changes the sample order of every run that resumes: it must be deliberate.
    assert Permutation(10, "windows", 1234, "main", "books", 0).array().tolist() == PINNED_SMALL
    assert Permutation(10**12, "windows", 1234, "main", "books", 1)[987654321] == PINNED_LARGE


PINNED_SMALL = [8, 3, 4, 0, 1, 9, 7, 5, 2, 6]
PINNED_LARGE = 441340591409


def test_keys_give_unrelated_orders_without_trend():
    size = 4096
    orders = [Permutation(size, "windows", 7, "main", "books", epoch).array() for epoch in range(3)]
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.08  # 5 standard deviations of a random order
        for other in orders[:i]:
            assert abs(np.corrcoef(other, order)[0, 1]) < 0.08
            assert (other == order).sum() < 12  # Poisson with mean 1
        # Neighbours are torn apart: mean distance of a random order is size / 3.
        assert abs(np.abs(np.diff(order)).mean() / size - 1 / 3) < 0.03


def test_small_sizes_reach_every_order():
    seen = {tuple(Permutation(3, key).array()) for key in range(300)}
    assert len(seen) == 6


@pytest.mark.parametrize("position", [-1, 5])
def test_outside_is_an_error(position):
    with pytest.raises(IndexError):
        Permutation(5, "key")[position]


def test_no_elements_is_an_error():
    with pytest.raises(ValueError, match="not 0"):
        Permutation(0, "key")
