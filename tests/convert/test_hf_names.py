"""Published names and configuration, where the golden cases have no say."""

import pytest
import torch

from hymba_train.convert.hf_config import model_config_from_hf
from hymba_train.convert.names import hf_parts
from hymba_train.describe import model_tensors, resolve_stack
from hymba_train.errors import UserError
from tests.hf_names import from_hf_state_dict, to_hf_state_dict

GROUPS = [[i, i + 1] for i in range(1, 15, 2)] + [[16, 17, 18]] + [[i, i + 1] for i in range(19, 31, 2)]
# The keys of Hymba-1.5B-Base that decide the model (hymba-architecture 1.1).
HYMBA_1_5B = dict(
    model_type="hymba", vocab_size=32001, hidden_size=1600, num_hidden_layers=32, intermediate_size=5504,
    hidden_act="silu", mlp_hidden_act="silu", num_attention_heads=25, num_key_value_heads=5, attn_hidden_size=-1,
    kq_head_dim=-1, v_head_dim=128, kq_norm="none", rope=True, rope_theta=10000.0, rope_type="ntk",
    max_position_embeddings=8192, orig_max_position_embeddings=2048, sliding_window=1024, global_attn_idx=[0, 15, 31],
    num_memory_tokens=128, memory_tokens_interspersed_every=0, kv_reuse_group=GROUPS, kv_reuse_every_i_layer=-1,
    mamba_expand=2, mamba_d_state=16, mamba_d_conv=4, mamba_dt_rank=100, mamba_conv_bias=True, mamba_proj_bias=False,
    mamba_inner_layernorms=True, layer_type=["h"] * 32, num_experts=1, num_experts_per_tok=1, rms_norm_eps=1e-6,
    initializer_range=0.02, attention_dropout=0.0, tie_word_embeddings=True,
)  # fmt: skip

SMALL = HYMBA_1_5B | dict(
    vocab_size=11, hidden_size=8, num_hidden_layers=3, intermediate_size=6, num_attention_heads=2, v_head_dim=8,
    num_key_value_heads=1, global_attn_idx=[0], num_memory_tokens=2, kv_reuse_group=[[1, 2]], mamba_dt_rank="auto",
    layer_type=["h"] * 3, mamba_d_state=2,
)  # fmt: skip


def test_published_model_has_its_tensors_and_parameters():
    config = model_config_from_hf(HYMBA_1_5B)
    names = {name: shape for t in model_tensors(config) for name, shape in hf_parts(t)}
    assert len(names) == 611
    assert sum(t.num_parameters for t in model_tensors(config)) == 1_522_797_824
    assert names["model.layers.0.mamba.conv1d.weight"] == (3200, 1, 4)
    assert names["model.layers.2.mamba.in_proj.weight"] == (8000, 1600)
    assert names["model.layers.31.moe.experts.0.up_proj.weight"] == (5504, 1600)
    assert resolve_stack(config)[16].kv_consumers == (17, 18)


def weights(config):
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randn(t.shape, generator=generator) for t in model_tensors(config)}


def test_round_trip_and_order_of_gate_and_up():
    config = model_config_from_hf(SMALL)
    ours = weights(config)
    hf = to_hf_state_dict(config, ours)
    assert "lm_head.weight" not in hf
    gate_up = ours["decoder.layers.1.ffn.linear_fc1.weight"]
    assert torch.equal(hf["model.layers.1.moe.experts.0.gate_proj.weight"], gate_up[:6])
    assert torch.equal(hf["model.layers.1.moe.experts.0.up_proj.weight"], gate_up[6:])
    back = from_hf_state_dict(config, hf | {"lm_head.weight": hf["model.embed_tokens.weight"].clone()})
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mlp_hidden_act="relu2"), r"mlp_hidden_act = 'relu2' is not supported; only 'silu' is"),
        (dict(kq_norm="rms", num_experts=4), r"kq_norm = 'rms' .*\n.*num_experts = 4"),
        (dict(rope_type="dynamic_ntk"), r"rope_type = 'dynamic_ntk' is not supported; only 'ntk' or 'default' is"),
        (dict(kq_head_dim=16), r"kq_head_dim = 16 not hidden_size / heads = 4"),
        (dict(attn_hidden_size=16), r"attn_hidden_size = 16 is not hidden_size \(8\)"),
        (dict(kv_reuse_group=None, kv_reuse_every_i_layer=2), r"kv_reuse_every_i_layer is not supported"),
        (dict(layer_type=["h", "x", "h"]), r"layer_type has layers other than 'h', 'a', 'm'"),
    ],
)
def test_a_setting_we_do_not_have_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_config_from_hf(SMALL | changes)


def test_a_missing_key_is_named():
    config = dict(SMALL)
    del config["sliding_window"]
    with pytest.raises(UserError, match=r"^config.json: sliding_window is missing$"):
        model_config_from_hf(config)
