"""Balance of pipeline stages, against trying every split."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_train.config import compose
from hymba_train.describe import head_flops, kv_crossing, layer_flops, resolve_stack
from hymba_train.plan.stages import TIE, balance, bubble_fraction, make_borders, make_chunks

MODEL = compose(["model=hymba_1p5b"]).model
LAYERS = resolve_stack(MODEL)
COSTS = [sum(layer_flops(MODEL, layer, 2048).values()) for layer in LAYERS]
HEAD = head_flops(MODEL)
TINY = resolve_stack(compose(["model=hymba_tiny"]).model)


def all_splits(num_layers, num_chunks):
    for cuts in itertools.combinations(range(1, num_layers), num_chunks - 1):
        edges = [0, *cuts, num_layers]
        yield [b - a for a, b in itertools.pairwise(edges)]


def chunk_costs(counts, costs, head):
    return [c.flops_per_token for c in make_chunks(counts, 1, costs, head)]


def num_cuts(layers, counts):
    return sum(len(kv_crossing(layers, b)) for b in itertools.accumulate(counts[:-1]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.lists(st.floats(0.1, 10), min_size=8, max_size=8), st.floats(0, 20))
def test_no_split_is_better(num_chunks, costs, head):
    counts = balance(TINY, num_chunks, costs, head)
    assert len(counts) == num_chunks and sum(counts) == 8 and min(counts) >= 1
    splits = list(all_splits(8, num_chunks))
    best = min(max(chunk_costs(s, costs, head)) for s in splits)
    limit = best * (1 + TIE) * (1 + 1e-12)
    assert max(chunk_costs(counts, costs, head)) <= limit
    ties = [s for s in splits if max(chunk_costs(s, costs, head)) <= best * (1 + TIE) * (1 - 1e-12)]
    if ties:
        assert num_cuts(TINY, counts) <= min(num_cuts(TINY, s) for s in ties)


@pytest.mark.parametrize(
    ("num_chunks", "expected"),
    [
        (1, [32]),
        (2, [16, 16]),
        (4, [7, 9, 9, 7]),
        (8, [3, 4, 4, 5, 5, 4, 4, 3]),
        (16, [1, 2, 2, 2, 2, 2, 2, 3, 3, 2, 2, 2, 2, 2, 2, 1]),
    ],
)
def test_stages_of_the_published_model_keep_kv_groups_whole(num_chunks, expected):
    """The output layer costs about as much as a layer, so the last stage gets fewer."""
    counts = balance(LAYERS, num_chunks, COSTS, HEAD)
    assert counts == expected
    assert num_cuts(LAYERS, counts) == 0


def test_even_cuts_of_the_published_model_carry_keys_and_values():
    chunks = make_chunks([4] * 8, 8, COSTS, HEAD)
    borders = make_borders(LAYERS, chunks, 5 * (64 + 128))
    assert {b.layer: b.kv_producers for b in borders} == {
        4: (3,), 8: (7,), 12: (11,), 16: (), 20: (19,), 24: (23,), 28: (27,)
    }  # fmt: skip
    assert [b.kv_width for b in borders] == [960, 960, 960, 0, 960, 960, 960]


def test_interleaved_chunks_go_round():
    chunks = make_chunks([4] * 8, 4, COSTS, HEAD)
    assert [(c.pipeline_rank, c.virtual_rank) for c in chunks] == [
        (0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1)
    ]  # fmt: skip
    assert chunks[5].layers == range(20, 24)
    assert chunks[7].flops_per_token == pytest.approx(sum(COSTS[28:]) + HEAD)


def test_more_chunks_than_layers_are_refused():
    with pytest.raises(ValueError, match="8 layers cannot fill 9 chunks"):
        balance(TINY, 9, [1.0] * 8, 0.0)


def test_bubble():
    assert bubble_fraction(1, 1, 4) == 0
    assert bubble_fraction(4, 1, 8) == pytest.approx(3 / 11)
    assert bubble_fraction(4, 2, 8) == pytest.approx(3 / 19)
