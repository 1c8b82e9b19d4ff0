"""Cache of one sequence: published figures, and counts by hand."""

import pytest

from hymba_train.config import compose
from hymba_train.describe import ACCOUNTINGS, cache_bytes

MODEL = compose(["model=hymba_1p5b"]).model


def test_the_1p5b_in_all_three_accountings():
    """Paper, Table 1: 78.6 MB. Released code: 17 layers hold K/V, local ones 128 + 1024 of them."""
    megabytes = {how: cache_bytes(MODEL, 8000, how).total_bytes / 1e6 for how in ACCOUNTINGS}
    assert {how: round(m, 2) for how, m in megabytes.items()} == {"ours": 84.98, "published": 81.88, "paper": 78.60}


def test_our_cache_by_hand():
    cache = cache_bytes(MODEL, 8000)
    a_token = 5 * (64 + 128) * 2
    assert cache.kv_bytes == (3 * (128 + 8000) + 14 * (128 + 1025)) * a_token
    assert cache.state_bytes == 32 * 3200 * (16 * 4 + 3 * 2)
    assert cache.total_bytes == cache.kv_bytes + cache.state_bytes


def test_a_sequence_shorter_than_the_window_fills_no_more_than_itself():
    short, shorter = cache_bytes(MODEL, 100), cache_bytes(MODEL, 99)
    assert short.kv_bytes - shorter.kv_bytes == 17 * 5 * (64 + 128) * 2
    assert short.state_bytes == shorter.state_bytes


def test_a_mamba2_layer_keeps_its_state_and_the_inputs_of_both_convolutions():
    overrides = ["model=hymba_tiny", "model.layer_pattern=[mamba2]", "model.kv_groups=[]", "model.num_layers=2"]
    model = compose([*overrides, "model.global_layers=[]"]).model
    assert cache_bytes(model, 1000).kv_bytes == 0
    assert cache_bytes(model, 1000).state_bytes == 2 * (256 * 128 * 4 + (256 + 2 * 128) * 3 * 2)
    assert cache_bytes(model, 1000, "paper").state_bytes == 2 * 256 * 128 * 2


def test_an_unknown_accounting_is_an_error():
    with pytest.raises(KeyError):
        cache_bytes(MODEL, 1, "guess")
