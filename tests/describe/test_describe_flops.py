"""FLOPs per token against the published figures and against counting pair by pair."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_train.config import compose
from hymba_train.describe import flops_per_token, resolve_stack, training_flops, visible_keys
from hymba_train.describe.flops import PARTS, layer_flops

MODEL = compose(["model=hymba_1p5b"]).model


@given(st.integers(0, 60), st.one_of(st.none(), st.integers(1, 30)), st.integers(0, 12))
def test_visible_keys_counts_pairs(positions, window, meta):
    pairs = sum(1 for i in range(positions) for j in range(i + 1) if window is None or i - j <= window or j < meta)
    assert visible_keys(positions, window, meta) == pairs


@pytest.mark.parametrize(("seq_length", "gflop"), [(2048, 10.565), (8192, 10.573)])
def test_training_flops_of_the_published_model(seq_length, gflop):
    assert round(training_flops(MODEL, seq_length) / 1e9, 3) == gflop


def test_parts_of_the_published_model():
    mflop = {part: round(flops / 1e6, 1) for part, flops in flops_per_token(MODEL, 2048).items()}
    assert mflop == {
        "in_proj": 925.9, "out_proj": 348.2, "ffn": 1796.5, "ssm_proj": 50.5, "attention_local": 250.8,
        "attention_global": 33.3, "conv_scan": 14.1, "head": 102.4,
    }  # fmt: skip
    assert tuple(mflop) == PARTS


def test_a_shared_meta_prefix_saves_what_it_should():
    assert round(training_flops(MODEL, 2048, sequences_per_prefix=4) / 1e9, 2) == 10.15


def test_layers_and_head_add_up_to_the_model():
    layers = sum(sum(layer_flops(MODEL, layer, 2048).values()) for layer in resolve_stack(MODEL))
    assert layers + 2 * 32001 * 1600 == pytest.approx(sum(flops_per_token(MODEL, 2048).values()), rel=1e-12)


def test_mixers_count_only_what_they_have():
    model = compose(
        [
            "model=hymba_tiny",
            "model.layer_pattern=[attention,ssm:no_ffn]",
            "model.kv_groups=[]",
            "model.num_meta_tokens=0",
        ]
    ).model
    attention, ssm = (layer_flops(model, layer, 256) for layer in resolve_stack(model)[:2])
    assert attention["conv_scan"] == attention["ssm_proj"] == 0 < attention["attention_global"]
    assert ssm["attention_global"] == ssm["attention_local"] == ssm["ffn"] == 0 < ssm["conv_scan"]
    # x and z of width 256 from a stream of 128, and back
    assert (ssm["in_proj"], ssm["out_proj"]) == (2 * 512 * 128, 2 * 256 * 128)
