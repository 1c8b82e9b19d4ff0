"""Which source comes when: exact shares, own order within each source, any sample first."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_train.data.blend import MAX_BLOCK_SAMPLES, MIN_BLOCK_SAMPLES, Blend, WholeEpochs
from hymba_train.errors import UserError

WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1e-2, 1e2), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, blocks=st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
def test_no_source_is_a_whole_sample_off_its_share_at_any_border(weights, blocks):
    blend = Blend(weights, 1, "main")
    for block in blocks:
        n = block * blend.block_samples
        counts = blend.counts_before(n)
        assert sum(counts.values()) == n
        for name, share in zip(blend.names, blend.shares, strict=True):
            assert abs(counts[name] - share * n) < 1


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, block=st.integers(0, 10**6), seed=st.integers(0, 100))
def test_each_source_comes_in_its_own_order_without_gaps(weights, block, seed):
    blend = Blend(weights, seed, "main")
    begin = block * blend.block_samples
    expected = blend.counts_before(begin)
    for n in range(begin, begin + min(2 * blend.block_samples, 1024)):
        name, k = blend[n]
        assert k == expected[name]
        expected[name] += 1
        if n % 97 == 0:
            assert blend.counts_before(n + 1) == expected


def test_random_access_equals_reading_in_order():
    weights = {"books": 0.5, "code": 0.3, "docs": 0.2}
    in_order = [Blend(weights, 3, "main")[n] for n in range(1000)]
    backwards = Blend(weights, 3, "main")
    assert [backwards[n] for n in reversed(range(1000))] == in_order[::-1]


def test_scale_and_spelling_order_of_weights_do_not_matter():
    first = Blend({"books": 3, "code": 1}, 3, "main")
    second = Blend({"code": 0.25, "books": 0.75, "unused": 0.0}, 3, "main")
    assert [first[n] for n in range(500)] == [second[n] for n in range(500)]


def test_weights_are_read_as_decimals():
    # As binary fractions 0.1 + 0.2 + 0.7 is not 1, and the shares would be slightly off.
    assert Blend({"a": 0.1, "b": 0.2, "c": 0.7}, 1, "main").shares == (
        Fraction(1, 10), Fraction(1, 5), Fraction(7, 10),
    )  # fmt: skip


def test_seed_phase_and_block_change_the_order():
    weights = {"books": 1, "code": 1}

    def names(blend: Blend, begin: int = 0) -> list[str]:
        return [blend[n][0] for n in range(begin, begin + MIN_BLOCK_SAMPLES)]

    reference = names(Blend(weights, 1, "main"))
    assert reference != names(Blend(weights, 2, "main"))
    assert reference != names(Blend(weights, 1, "decay"))
    assert reference != names(Blend(weights, 1, "main"), MIN_BLOCK_SAMPLES)
    assert reference != sorted(reference)


def test_order_is_pinned():
    # A change here changes the sample order of every run that resumes: it must be deliberate.
    blend = Blend({"books": 0.5, "code": 0.3, "docs": 0.2}, 1234, "main")
    assert "".join(blend[n][0][0] for n in range(40)) == PINNED


PINNED = "bbbbbcbbddbdcbcbdcbbdbbbbbbbdbbbcbbdcdbb"


def test_rare_sources_get_longer_blocks_and_never_step_back():
    blend = Blend({"common": 1.0, "rare": 1e-4, "rarer": 0.9e-4}, 1, "main")
    assert blend.block_samples == 16384
    previous = blend.counts_before(0)
    for block in range(1, 200):
        counts = blend.counts_before(block * blend.block_samples)
        assert all(counts[name] > previous[name] for name in counts)
        previous = counts


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0, "b": 1.0}, "data.phases.main.blend.a = -1.0: a weight is a finite number >= 0"),
        ({"a": float("nan")}, "data.phases.main.blend.a = nan"),
        ({"a": 0.0}, "data.phases.main.blend has no source with a positive weight"),
        ({}, "data.phases.main.blend has no source with a positive weight"),
        ({"a": 1.0, "b": 0.5 / MAX_BLOCK_SAMPLES}, "data.phases.main.blend.b is a share of 4.77e-07"),
    ],
)
def test_bad_weights_are_one_line(weights, message):
    with pytest.raises(UserError) as caught:
        Blend(weights, 1, "main")
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(message)


def test_whole_epochs_count_what_came_before_anywhere():
    order = WholeEpochs({"a": 5, "b": 3, "c": 1}, 7, "main")
    came: Counter[str] = Counter({name: 0 for name in order.names})
    for n in range(2 * order.epoch_samples + 4):
        assert order.counts_before(n) == came
        came[order[n][0]] += 1
    with pytest.raises(IndexError, match="negative"):
        order[-1]
