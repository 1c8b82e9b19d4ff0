"""Balance of pipeline stages, against trying every split."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_train.cli import main
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


PUBLISHED = [  # pipeline stages, layers of each, busiest stage over the mean
    (1, [32], 1.0),
    (2, [16, 16], 1.027),
    (4, [7, 9, 9, 7], 1.094),
    (8, [3, 4, 4, 5, 5, 4, 4, 3], 1.219),
    (16, [1, 2, 2, 2, 2, 2, 2, 3, 3, 2, 2, 2, 2, 2, 2, 1], 1.470),
]


@pytest.mark.parametrize(("stages", "layers", "busiest"), PUBLISHED)
def test_stages_of_the_published_model_keep_kv_groups_whole(stages, layers, busiest):
    """The output layer costs about as much as a layer, so the last stage gets fewer."""
    counts = balance(LAYERS, stages, COSTS, HEAD)
    assert counts == layers and num_cuts(LAYERS, counts) == 0
    costs = chunk_costs(counts, COSTS, HEAD)
    assert max(costs) * stages / sum(costs) == pytest.approx(busiest, abs=5e-4)


@pytest.mark.parametrize(("stages", "layers", "busiest"), PUBLISHED[1:])
def test_stages_of_the_published_model_are_printed(stages, layers, busiest, capsys):
    overrides = ["experiment=pretrain_1p5b", f"parallel.pipeline={stages}", "parallel.world_size=null"]
    assert main(["plan", *overrides, "--skip-paths"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(f"Stages (busiest over mean: {busiest:.3f}; 0 KV groups cut)")
    rows = [line.split() for line in lines[start + 4 : start + 4 + stages]]
    ends = list(itertools.accumulate(layers))
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (str(i), f"{end - count}..{end - 1}", "-") for i, (count, end) in enumerate(zip(layers, ends, strict=True))
    ]
    of_the_mean = [float(row[3]) for row in rows]
    assert max(of_the_mean) == pytest.approx(busiest, abs=1e-3)
    assert sum(of_the_mean) == pytest.approx(stages, abs=0.01)


def test_stages_that_cut_kv_groups_are_printed(capsys):
    overrides = ["experiment=pretrain_1p5b", "parallel.pipeline=2", "parallel.pipeline_layout=[8,24]"]
    assert main(["plan", *overrides, "parallel.world_size=null", "--skip-paths"]) == 0
    out = capsys.readouterr().out
    assert "1 KV group cut)" in out and "layer 7 (960 values a token)" in out


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
