"""The stack of the published model, of the design roadmap's rows, and what is refused."""

import pytest

from hymba_train.config import compose
from hymba_train.describe import kv_crossing, resolve_stack
from hymba_train.describe.dims import effective_rotary_base, padded_vocab_size

MODEL = compose(["model=hymba_1p5b"]).model
LAYERS = resolve_stack(MODEL)


def tiny(*overrides):
    return compose(["model=hymba_tiny", *overrides]).model


def test_roles_of_the_published_model():
    by_role = {}
    for layer in LAYERS:
        by_role.setdefault(layer.kv_role, []).append(layer.index)
    assert by_role == {
        "own": [0, 15, 31],
        "producer": [1, 3, 5, 7, 9, 11, 13, 16, 19, 21, 23, 25, 27, 29],
        "consumer": [2, 4, 6, 8, 10, 12, 14, 17, 18, 20, 22, 24, 26, 28, 30],
    }
    assert LAYERS[16].kv_consumers == (17, 18) and LAYERS[18].kv_source == 16
    assert [x.index for x in LAYERS if x.window is None] == [0, 15, 31]


def test_borders_that_keep_kv_groups_whole():
    whole = [b for b in range(1, 32) if not kv_crossing(LAYERS, b)]
    assert whole == [1, 3, 5, 7, 9, 11, 13, 15, 16, 19, 21, 23, 25, 27, 29, 31]


@pytest.mark.parametrize(("stages", "split"), [(2, []), (4, [8, 24]), (8, [4, 8, 12, 20, 24, 28])])
def test_even_cuts_that_split_kv_groups(stages, split):
    borders = range(32 // stages, 32, 32 // stages)
    assert [b for b in borders if kv_crossing(LAYERS, b)] == split


def test_a_triple_crosses_two_borders():
    assert kv_crossing(LAYERS, 17) == kv_crossing(LAYERS, 18) == (16,)
    assert kv_crossing(LAYERS, 19) == ()


@pytest.mark.parametrize(
    ("pattern", "mixers"),
    [
        ("[ssm]", "ssm ssm ssm ssm ssm ssm ssm ssm"),
        ("[attention]", "attention " * 8),
        ("[ssm,attention]", "ssm attention " * 4),
        ("[hybrid]", "hybrid " * 8),
    ],
)
def test_rows_of_the_design_roadmap_are_lists_of_layers(pattern, mixers):
    layers = resolve_stack(tiny(f"model.layer_pattern={pattern}", "model.kv_groups=[]", "model.window_size=null"))
    assert [x.mixer for x in layers] == mixers.split()
    assert {x.window for x in layers} == {None}
    assert all(x.kv_role == ("own" if x.has_attention else "none") for x in layers)


def test_samba_style_leaves_ffns_out():
    layers = resolve_stack(tiny("model.layer_pattern=[ssm,attention:no_ffn]", "model.kv_groups=[]"))
    assert [x.has_ffn for x in layers] == [True, False] * 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layer_pattern=[]", "model.layer_pattern is empty"),
        ("model.layer_pattern=[mamba]", "'mamba' is not one of"),
        ("model.global_layers=[8]", "model.global_layers: 8 is not a layer; layers are 0..7"),
        ("model.kv_groups=[[1]]", "two or more layers in rising order"),
        ("model.kv_groups=[[2,1]]", "two or more layers in rising order"),
        ("model.kv_groups=[[1,9]]", "9 is not a layer"),
        ("model.kv_groups=[[1,2],[2,4]]", "layer 2 is in two groups"),
        ("model.kv_groups=[[2,3]]", "must see alike"),
    ],
)
def test_a_stack_that_cannot_be_is_refused(override, message):
    with pytest.raises(ValueError, match="model\\.") as caught:
        resolve_stack(tiny(override))
    assert message in str(caught.value)


def test_rotary_base_and_vocabulary():
    assert effective_rotary_base(MODEL) == pytest.approx(74_534.83, abs=0.01)
    assert effective_rotary_base(MODEL, "default") == 10_000
    assert [padded_vocab_size(MODEL, tp) for tp in (1, 2, 4)] == [32128, 32256, 32256]
