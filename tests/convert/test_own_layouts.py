"""Models that the published code cannot express, through the exported code: equal to training, or refused."""

import dataclasses

import pytest
import torch

from hymba_train.config.schema import ModelConfig
from hymba_train.convert.hf_config import TokenIds, hf_config, model_config_from_hf, require_exportable
from hymba_train.errors import UserError
from hymba_train.hf.configuration_hymba import HymbaConfig
from hymba_train.hf.modeling_hymba import HymbaForCausalLM
from hymba_train.oracle import OracleHymba
from tests.hf_names import to_hf_state_dict

SIZES = dict(
    num_layers=4, hidden_size=48, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, vocab_size=61,
    window_size=5, num_meta_tokens=3, global_layers=[0, 3],
)  # fmt: skip
MODELS = {
    "llama": dict(layer_pattern=["attention"], v_head_dim=12, num_meta_tokens=0, window_size=None, global_layers=[]),
    "sequential": dict(layer_pattern=["ssm", "ssm:no_ffn", "attention"], v_head_dim=12),
    "concat": dict(branch_fusion="concat", kv_groups=[[1, 2]], kv_channels=8, v_head_dim=6),
}


@pytest.mark.parametrize("name", MODELS)
def test_exported_code_computes_what_training_does(name):
    """Logits in one pass, and token by token through the cache."""
    torch.manual_seed(0)
    model = ModelConfig(name=name, **{**SIZES, **MODELS[name]})
    oracle = OracleHymba(model).double()
    with torch.no_grad():
        for p in oracle.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (0.5 if p.dim() == 1 else 0))
    exported = HymbaForCausalLM(HymbaConfig(**hf_config(model, "float32", TokenIds()))).double().eval()
    exported.load_state_dict(to_hf_state_dict(model, oracle.state_dict()), strict=False)
    tokens = torch.randint(0, 61, (2, 13))
    with torch.no_grad():
        expected = oracle(tokens).logits
        torch.testing.assert_close(exported(tokens).logits, expected, rtol=1e-6, atol=1e-6)
        cache, steps = None, []
        for t in range(tokens.shape[1]):
            out = exported(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_configuration_comes_back(name):
    model = ModelConfig(name="hymba", **{**SIZES, **MODELS[name]})
    back = model_config_from_hf(hf_config(model, "float32", TokenIds()))
    changed = {k for k, v in dataclasses.asdict(model).items() if dataclasses.asdict(back)[k] != v}
    # Spelled out in config.json: the rank that follows from the width, and global layers where there is no window.
    assert changed <= {"mamba_dt_rank", "global_layers", "layer_pattern"}
    expected = [model.layer_pattern[i % len(model.layer_pattern)] for i in range(4)]
    assert [back.layer_pattern[i % len(back.layer_pattern)] for i in range(4)] == expected


def test_mamba2_has_no_export():
    model = ModelConfig(name="mamba2", **{**SIZES, "layer_pattern": ["mamba2"], "mamba2_head_dim": 16})
    for refuse in (require_exportable, lambda m: hf_config(m, "float32", TokenIds())):
        with pytest.raises(
            UserError, match=r"^model\.layer_pattern=\['mamba2'\]: the Hugging Face format .* no mamba2"
        ):
            refuse(model)
