"""Prefetching changes when work is done, never what comes out."""

import threading
import time

import pytest

from hymba_train.data.prefetch import Prefetcher


def test_same_items_in_the_same_order():
    assert list(Prefetcher(range(50), depth=3)) == list(range(50))


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        yield 2
        raise KeyError("broken")

    prefetcher = Prefetcher(items())
    assert [next(prefetcher), next(prefetcher)] == [1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(prefetcher)
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_works_ahead_but_not_further_than_depth():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    with Prefetcher(items(), depth=2) as prefetcher:
        assert next(prefetcher) == 0
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]  # one taken, two waiting, one in hand


def test_close_stops_the_thread_of_an_endless_source():
    def items():
        while True:
            yield 0

    before = threading.active_count()
    with Prefetcher(items()) as prefetcher:
        next(prefetcher)
    assert threading.active_count() == before
