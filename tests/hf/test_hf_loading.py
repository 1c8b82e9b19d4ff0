"""Configuration, names, and transformers' own ways to save, load and initialise a model."""

import json
import math

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hymba_train.config import compose
from hymba_train.config.schema import ModelConfig
from hymba_train.convert.hf_config import TokenIds, hf_config, model_config_from_hf
from hymba_train.convert.names import hf_parts
from hymba_train.describe import model_tensors
from hymba_train.hf.configuration_hymba import HymbaConfig
from hymba_train.hf.modeling_hymba import HymbaForCausalLM
from hymba_train.oracle import OracleHymba
from tests.convert.test_hf_names import HYMBA_1_5B
from tests.hf_models import make_model
from tests.hf_names import to_hf_state_dict

E, D, R, N, F = 3200, 1600, 100, 16, 5504
PUBLISHED_LAYER = {
    "input_layernorm.weight": (D,),
    "mamba.in_proj.weight": (8960, D),
    "mamba.conv1d.weight": (E, 1, 4),
    "mamba.conv1d.bias": (E,),
    "mamba.x_proj.0.weight": (R + 2 * N, E),
    "mamba.dt_proj.0.weight": (E, R),
    "mamba.dt_proj.0.bias": (E,),
    "mamba.A_log.0": (E, N),
    "mamba.D.0": (E,),
    "mamba.dt_layernorm.weight": (R,),
    "mamba.B_layernorm.weight": (N,),
    "mamba.C_layernorm.weight": (N,),
    "mamba.pre_avg_layernorm1.weight": (E,),
    "mamba.pre_avg_layernorm2.weight": (E,),
    "mamba.out_proj.weight": (D, E),
    "pre_moe_layernorm.weight": (D,),
    "moe.experts.0.gate_proj.weight": (F, D),
    "moe.experts.0.up_proj.weight": (F, D),
    "moe.experts.0.down_proj.weight": (D, F),
}
PUBLISHED = {
    "model.embed_tokens.weight": (32001, D),
    "model.memory_tokens": (128, D),
    "model.final_layernorm.weight": (D,),
} | {f"model.layers.{i}.{name}": shape for i in range(32) for name, shape in PUBLISHED_LAYER.items()}
for i in (2, 4, 6, 8, 10, 12, 14, 17, 18, 20, 22, 24, 26, 28, 30):
    PUBLISHED[f"model.layers.{i}.mamba.in_proj.weight"] = (8000, D)


def test_defaults_are_the_published_model():
    """611 tensors of the published names and shapes, 1,522,797,824 parameters, base 74,534.83 (architecture 2.6, 4)."""
    config = HymbaConfig()
    with torch.device("meta"):
        model = HymbaForCausalLM(config)
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(PUBLISHED) == 611 and found == PUBLISHED
    assert set(model.state_dict()) == set(PUBLISHED) | {"lm_head.weight"}
    assert sum(p.numel() for p in model.parameters()) == 1_522_797_824
    assert config.rotary_base == pytest.approx(74_534.83, abs=0.01)
    assert (config.v_head_dim, config.mamba_dt_rank, config.conv_dim["31"]) == (128, 100, 3200)


def test_our_configuration_of_the_published_model_is_its_config_json():
    model = model_config_from_hf(HymbaConfig().to_dict())
    written = hf_config(model, "bfloat16", TokenIds())
    config = HymbaConfig(**{k: v for k, v in written.items() if k not in ("torch_dtype", "dtype")})
    for key, value in HymbaConfig().to_dict().items():
        if key in written and key not in ("dtype", "torch_dtype", "architectures", "auto_map"):
            assert getattr(config, key) == value == written[key], key
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


def test_an_export_of_the_recipe_is_the_published_model():
    """Names and shapes of every tensor, and config.json."""
    model = compose(["model=hymba_1p5b"]).model
    assert {name: shape for t in model_tensors(model) for name, shape in hf_parts(t)} == PUBLISHED
    written = hf_config(model, "bfloat16", TokenIds())
    assert {key: written[key] for key in HYMBA_1_5B} == HYMBA_1_5B
    assert model_config_from_hf(written) == model_config_from_hf(HYMBA_1_5B)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"num_experts": 16}, "num_experts"),
        ({"rope_type": "dynamic_ntk"}, "rope_type"),
        ({"kv_reuse_group": [[0, 1]]}, "see differently"),
        ({"kv_reuse_group": [[1, 99]]}, "within"),
        ({"kv_reuse_group": [[1, 2], [2, 3]]}, "two groups"),
        ({"layer_type": ["h"]}, "entries"),
        ({"layer_type": ["q"] * 32}, "layer_type"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"decode_window": "wide"}, "decode_window"),
        ({"decode_backend": "fast"}, "decode_backend"),
        ({"num_hidden_layers": 4, "kv_reuse_group": []}, "global_attn_idx"),
    ],
    ids=str,
)
def test_what_this_code_does_not_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HymbaConfig(**changes)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_round_trip(tmp_path, tied):
    model = make_model(dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    state = model.state_dict()
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    assert set(state) - set(stored) == ({"lm_head.weight"} if tied else set())
    assert (tmp_path / "modeling_hymba.py").is_file() and (tmp_path / "configuration_hymba.py").is_file()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForCausalLM"] == "modeling_hymba.HymbaForCausalLM"
    again, info = HymbaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ids = torch.randint(3, 61, (2, 20))
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_time_step_parameters_stay_float32_in_bf16(tmp_path):
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    spelling = "torch_dtype" if version.parse(transformers.__version__) < version.parse("4.56") else "dtype"
    half = HymbaForCausalLM.from_pretrained(tmp_path, **{spelling: torch.bfloat16}).eval()
    kept = {name for name, p in half.named_parameters() if p.dtype is torch.float32}
    assert kept == {n for n, _ in half.named_parameters() if any(part in n for part in ("A_log", ".D.", "dt_proj"))}
    for name in kept:
        assert torch.equal(half.get_parameter(name), model.get_parameter(name))
    ids = torch.randint(3, 61, (2, 20))
    out = half(ids, use_cache=True)
    assert out.logits.dtype is torch.float32 and out.past_key_values.ssm[0].dtype is torch.float32
    scale = model(ids).logits.std()
    assert (out.logits - model(ids).logits).abs().mean() / scale < 0.05


def test_a_fresh_model_starts_as_mamba_does():
    torch.manual_seed(0)
    config = make_model().config
    config.initializer_range = 0.02
    model = HymbaForCausalLM(config).requires_grad_(False)
    mixer = model.model.layers[1].mamba
    torch.testing.assert_close(torch.exp(mixer.A_log()), torch.arange(1.0, 5).expand(64, 4))
    assert (mixer.D() == 1).all() and (mixer.pre_avg_layernorm1.weight == 1).all()
    step = nn.functional.softplus(mixer.dt_proj[0].bias)
    assert 1e-3 * 0.99 <= step.min() < 5e-3 and 2e-2 < step.max() <= 1e-1 * 1.01
    assert model.model.memory_tokens.std() == pytest.approx(0.02, rel=0.3)
    assert model.get_input_embeddings().weight.std() == pytest.approx(0.02, rel=0.1)


MIXED = ModelConfig(
    name="mixed", num_layers=6, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    vocab_size=50, layer_pattern=["hybrid", "attention:no_ffn", "attention", "ssm", "ssm:no_ffn", "hybrid"],
    global_layers=[0, 5], kv_groups=[[1, 2]], window_size=4, num_meta_tokens=3, mamba_state_dim=4,
    rope_type="ntk", max_position_embeddings=64, rope_original_max_positions=16,
)  # fmt: skip
ALL_GLOBAL = ModelConfig(
    name="global", num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=4,
    vocab_size=50, window_size=None, num_meta_tokens=0, mamba_state_dim=4, untie_embeddings_and_output_weights=True,
)  # fmt: skip


@pytest.mark.parametrize("model", [MIXED, ALL_GLOBAL], ids=["mixed", "all global, untied, no meta tokens"])
def test_every_stack_that_can_be_trained_can_be_exported(model):
    """Against the oracle; configuration there and back; cached steps."""
    torch.manual_seed(0)
    oracle = OracleHymba(model).double()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    written = json.loads(json.dumps(hf_config(model, "float32", TokenIds())))
    shipped = HymbaForCausalLM(HymbaConfig(**written)).double().eval()
    weights = to_hf_state_dict(model, dict(oracle.named_parameters()))
    missing, unexpected = shipped.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    ids = torch.randint(50, (2, 15))
    with torch.no_grad():
        expected = oracle(ids).logits
        torch.testing.assert_close(shipped(ids).logits, expected, rtol=0, atol=1e-9)
        cache, steps = None, []
        for token in ids.split(1, 1):
            out = shipped(token, past_key_values=cache, use_cache=True)
            cache, steps = out.past_key_values, [*steps, out.logits]
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-9)
    back = model_config_from_hf(written)
    differing = {f for f in vars(model) if getattr(back, f) != getattr(model, f)} - {"name"}
    assert differing <= {"mamba_dt_rank", "global_layers", "layer_pattern"}
    assert back.mamba_dt_rank == math.ceil(32 / 16)
    assert [back.layer_pattern[i % len(back.layer_pattern)] for i in range(6)] == [
        model.layer_pattern[i % len(model.layer_pattern)] for i in range(6)
    ]


def test_auto_classes_know_the_model_once_registered(tmp_path, small):
    """As a user of this package registers it, without remote code."""
    AutoConfig.register("hymba", HymbaConfig, exist_ok=True)
    AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM, exist_ok=True)
    make_model(dtype=torch.float32).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved.pop("auto_map")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), HymbaForCausalLM)


def test_a_model_spread_over_memory_and_disk(tmp_path):
    """accelerate's hooks load offloaded weights when a module is called: no weight may be read past that."""
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra 'eval')")
    whole = make_model(dtype=torch.float32)
    whole.save_pretrained(tmp_path / "model")
    places = {
        "model.embed_tokens": "cpu",
        "lm_head": "cpu",
        "model.final_layernorm": "cpu",
        "model.memory_tokens": "cpu",
    }
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    spread = HymbaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert spread.model.layers[1].mamba.in_proj.weight.is_meta
    ids, mask = torch.randint(3, 61, (2, 20)), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :9] = 0
    settings = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(spread.generate(ids, **settings), whole.generate(ids, **settings))
