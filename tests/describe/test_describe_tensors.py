"""Parameters of the published model, and how tensor parallelism deals them out."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_train.config import compose
from hymba_train.describe import (
    Slice,
    held_parameters,
    layer_tensors,
    model_tensors,
    partition,
    resolve_stack,
)

MODEL = compose(["model=hymba_1p5b"]).model
LAYERS = resolve_stack(MODEL)


def test_parameter_counts_of_the_published_model():
    assert sum(t.num_parameters for t in model_tensors(MODEL)) == 1_522_797_824
    per_layer = Counter(sum(t.num_parameters for t in layer_tensors(MODEL, layer)) for layer in LAYERS)
    assert per_layer == {46_700_932: 17, 45_164_932: 15}


def test_an_untied_head_is_counted_apart():
    untied = compose(["model=hymba_1p5b", "model.untie_embeddings_and_output_weights=true"]).model
    assert sum(t.num_parameters for t in model_tensors(untied)) == 1_573_999_424


def test_in_proj_rows_of_producers_and_consumers():
    for layer in LAYERS:
        in_proj = next(t for t in layer_tensors(MODEL, layer) if t.name == "mixer.in_proj.weight")
        widths = {s.name: s.size for s in in_proj.slices}
        if layer.kv_role == "consumer":
            assert (in_proj.shape, widths) == ((8000, 1600), {"q": 1600, "x": 3200, "z": 3200})
        else:
            assert (in_proj.shape, widths) == ((8960, 1600), {"q": 1600, "k": 320, "v": 640, "x": 3200, "z": 3200})


def hf_names(tensors):
    """Names in the published file: gate_proj and up_proj are one tensor here."""
    for t in tensors:
        if "{" in t.hf_name:
            head, _, rest = t.hf_name.partition("{")
            middle, _, tail = rest.partition("}")
            yield from (head + part + tail for part in middle.split(","))
        else:
            yield t.hf_name


def test_there_are_611_tensors_in_the_published_file():
    names = list(hf_names(model_tensors(MODEL)))
    assert len(names) == len(set(names)) == 611
    assert "model.layers.31.moe.experts.0.gate_proj.weight" in names and "model.memory_tokens" in names


def test_names_and_slices_are_sound():
    tensors = model_tensors(MODEL)
    assert len({t.name for t in tensors}) == len(tensors)
    for t in tensors:
        if t.axis is None:
            assert not t.slices
        else:
            assert sum(s.size for s in t.slices) == t.shape[t.axis], t.name
        assert not (t.weight_decay and t.float32), t.name
        assert t.weight_decay == (len(t.shape) == 2 and t.name.split(".")[-2] not in ("conv", "mixer", "embedding")), (
            t.name
        )


@given(st.integers(1, 200), st.integers(1, 16))
def test_partition_deals_every_unit_once(units, ranks):
    parts = [partition(units, ranks, r) for r in range(ranks)]
    held = [u for first, count, _ in parts for u in range(first, first + count)]
    assert held == list(range(units))
    capacities = {capacity for _, _, capacity in parts}
    assert capacities == {-(-units // ranks)}
    assert all(capacity - 1 <= count <= capacity for _, count, capacity in parts if units >= ranks)


@given(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 200))
def test_blocks_deal_every_unit_once(units, ranks, multiple):
    part = Slice("vocab", units, block_multiple=multiple)
    parts = [part.part(ranks, r) for r in range(ranks)]
    assert [u for first, count, _ in parts for u in range(first, first + count)] == list(range(units))
    assert len({c for _, _, c in parts}) == 1 and parts[0][2] % multiple == 0


@pytest.mark.parametrize(("ranks", "expected"), [(1, 46_700_932), (5, None)])
def test_held_parameters_without_padding_add_up(ranks, expected):
    """5 ranks deal 25 heads and 5 KV heads evenly; only what is not cut, and the padded FFN, is held more than once."""
    layer = LAYERS[0]
    for t in layer_tensors(MODEL, layer):
        held = held_parameters(t, ranks)
        if t.axis is None:
            assert held == t.num_parameters
        elif t.name.startswith("mixer"):
            assert held * ranks == t.num_parameters
    if expected:
        assert sum(held_parameters(t, ranks) for t in layer_tensors(MODEL, layer)) == expected


def test_held_parameters_with_padding():
    in_proj = next(t for t in layer_tensors(MODEL, LAYERS[0]) if t.name == "mixer.in_proj.weight")
    # 13 of 25 heads a rank; 5 KV heads do not divide by 2, so each rank holds all of them
    assert held_parameters(in_proj, 2) == (13 * 64 + 5 * 64 + 5 * 128 + 2 * 13 * 128) * 1600
    words = model_tensors(MODEL)[0]
    assert held_parameters(words, 2) == 32256 // 2 * 1600  # 32,001 padded to a multiple of 2 x 128
