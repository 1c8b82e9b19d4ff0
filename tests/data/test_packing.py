"""Best-fit packing on histograms: the textbook algorithm's result, every token predicted once, buckets kept apart."""

from bisect import bisect_left, insort
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_train.data.packing import FILLER_SHARE, assign, cut_documents, pack_lengths

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=120)
CAPACITY = st.integers(2, 130)


def textbook_best_fit_decreasing(lengths, capacity) -> list[int]:
    """Room left in each sequence: one piece after another into the fullest sequence that it fits."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else capacity
        insort(rooms, room - length)
    return rooms


def packed(sizes, capacity, strategy) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """(first tokens, lengths, piece numbers of each sequence) of documents end to end."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    starts, lengths = cut_documents(offsets, capacity - 1)
    groups = pack_lengths(np.bincount(lengths, minlength=capacity + 1), capacity, strategy)
    order, first = assign(lengths, groups)
    return starts, lengths, np.split(order, first[1:-1]) if lengths.size else []


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=200), spare=st.integers(0, 40))
def test_as_many_sequences_just_as_full_as_the_textbook_makes(lengths, spare):
    capacity = max(lengths) + spare
    groups = pack_lengths(np.bincount(lengths, minlength=capacity + 1), capacity, "best_fit")
    rooms = sorted(group.room for group in groups for _ in range(group.count))
    assert rooms == textbook_best_fit_decreasing(lengths, capacity)
    for group in groups:
        assert group.room == capacity - sum(length * times for length, times in group.pattern)
    found = Counter()
    for group in groups:
        for length, times in group.pattern:
            found[length] += group.count * times
    assert found == Counter(lengths)


@pytest.mark.parametrize("strategy", ["best_fit", "length_buckets"])
@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, capacity=CAPACITY)
def test_every_token_but_the_first_of_a_document_is_predicted_exactly_once(strategy, sizes, capacity):
    starts, lengths, sequences = packed(sizes, capacity, strategy)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    predicted = np.zeros(int(offsets[-1]), dtype=int)
    for sequence in sequences:
        assert lengths[sequence].sum() <= capacity
        for piece in sequence:
            assert 2 <= lengths[piece] <= capacity
            begin = int(starts[piece])
            document = np.searchsorted(offsets, begin, side="right") - 1
            assert begin + lengths[piece] <= offsets[document + 1], "a piece lies in one document"
            predicted[begin + 1 : begin + lengths[piece]] += 1
    expected = np.ones_like(predicted)
    expected[offsets[:-1]] = 0
    assert predicted.tolist() == expected.tolist()


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, capacity=st.integers(32, 130))
def test_length_buckets_hold_documents_of_like_length_and_fillers(sizes, capacity):
    _, lengths, sequences = packed(sizes, capacity, "length_buckets")
    for sequence in sequences:
        real = [length for length in lengths[sequence].tolist() if length > capacity // FILLER_SHARE]
        if real:
            assert max(real) < 2 * min(real)


def test_a_long_document_has_a_sequence_to_itself_and_fillers_under_length_buckets_alone():
    sizes = np.clip(np.random.default_rng(0).lognormal(6.3, 1.2, 20_000), 2, 60_000).astype(int)

    def share_with_company(strategy) -> float:
        """Of the sequences with a piece of half a sequence to a whole one: those with another that is no filler."""
        _, lengths, sequences = packed(sizes, 8193, strategy)
        pieces = [np.sort(lengths[sequence])[::-1] for sequence in sequences]
        company = [own.size > 1 and own[1] > 512 for own in pieces if 4096 < own[0] < 8193]
        return float(np.mean(company))

    assert share_with_company("length_buckets") == 0
    assert share_with_company("best_fit") > 0.8


def test_pieces_of_one_length_keep_the_order_of_the_file():
    lengths = np.array([5, 3, 5, 3, 5, 3], dtype=np.int32)
    order, first = assign(lengths, pack_lengths(np.bincount(lengths, minlength=9), 8, "best_fit"))
    assert [pieces.tolist() for pieces in np.split(order, first[1:-1])] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("strategy", ["best_fit", "length_buckets"])
def test_the_packing_is_pinned(strategy):
    # A change here changes the sample order of every run that resumes: it must be deliberate.
    sizes = np.clip(np.random.default_rng(5).lognormal(3, 1, 30), 2, 200).astype(int)
    _, _, sequences = packed(sizes, 65, strategy)
    assert [sequence.tolist() for sequence in sequences[:8]] == PINNED[strategy]


PINNED = {
    "best_fit": [[9], [14], [4, 17], [27, 18], [8, 5], [10, 11], [15, 3], [23, 26]],
    "length_buckets": [[9], [14], [4, 17], [27], [8], [10], [15], [23]],
}


@pytest.mark.parametrize(("min_tokens", "kept"), [(0, [3, 9, 2]), (3, [3, 9]), (4, [9]), (10, [])])
def test_short_documents_can_be_left_out(min_tokens, kept):
    sizes = np.array([3, 1, 9, 0, 2])
    _, lengths = cut_documents(np.concatenate([[0], np.cumsum(sizes)]), 100, min_tokens)
    assert lengths.tolist() == kept


def test_a_document_longer_than_a_sequence_is_cut_with_one_token_shared():
    starts, lengths = cut_documents(np.array([10, 10 + 21]), 8)
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == [(10, 9), (18, 9), (26, 5)]
    starts, lengths = cut_documents(np.array([10, 10 + 17]), 8)  # its last token is the last label: nothing is left
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == [(10, 9), (18, 9)]


def test_ten_million_lengths_take_no_longer_than_their_histogram():
    histogram = np.zeros(8194, dtype=np.int64)
    histogram[np.arange(2, 8194)] = 12_207
    groups = pack_lengths(histogram, 8193, "best_fit")
    assert sum(group.count * sum(times for _, times in group.pattern) for group in groups) == histogram.sum()
    assert len(groups) < 3 * 8193
