"""Finding culprits: a search over made-up batches."""

from __future__ import annotations

import itertools

import pytest

from hymba_train.guards.classify import MOST_PROBES, diagnose

PLACES = [(rank, number) for number in range(8) for rank in range(4)]


def search(culprits: set, control=lambda: True):
    return diagnose(PLACES, lambda: False, control, lambda removed: culprits <= removed)


def test_a_step_that_is_good_the_second_time_was_no_fault_of_the_batch():
    found = diagnose(PLACES, lambda: True, None, lambda removed: pytest.fail("no more runs are needed"))
    assert (found.kind, found.num_runs) == ("transient", 1)


def test_good_data_that_is_bad_now_is_persistent():
    assert diagnose(PLACES, lambda: False, lambda: False, pytest.fail).kind == "persistent"


@pytest.mark.parametrize("place", PLACES)
def test_one_culprit_is_found_in_few_runs(place):
    found = search({place})
    assert (found.kind, found.culprits) == ("data", (place,))
    assert found.num_runs <= 2 + 2 * 5  # log2 of 32


@pytest.mark.parametrize("pair", list(itertools.combinations(PLACES[::3], 2)))
def test_two_culprits_are_found(pair):
    assert search(set(pair)).culprits == tuple(sorted(pair))


def test_without_any_good_run_nothing_is_blamed_on_the_batch():
    found = diagnose(PLACES, lambda: False, None, lambda removed: False)
    assert (found.kind, found.culprits) == ("persistent", ()) and found.num_runs <= MOST_PROBES + 1


def test_a_single_micro_batch_is_judged_by_the_control_alone():
    def nothing_left(removed):
        pytest.fail("nothing would be left")

    assert diagnose([(0, 0)], lambda: False, lambda: True, nothing_left).culprits == ((0, 0),)
    assert diagnose([(0, 0)], lambda: False, None, nothing_left).kind == "persistent"


def test_a_batch_that_is_bad_as_a_whole_names_nobody():
    found = diagnose(PLACES, lambda: False, lambda: True, lambda removed: False)
    assert (found.kind, found.culprits) == ("data", ())
