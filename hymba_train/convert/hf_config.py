"""config.json and generation_config.json of an export (hymba-architecture 1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hymba_train.config.schema import ModelConfig
from hymba_train.convert.names import LAYER_TYPES
from hymba_train.describe import ModelDims, export_obstacles, resolve_stack
from hymba_train.errors import UserError

AUTO_MAP = {
    "AutoConfig": "configuration_hymba.HymbaConfig",
    "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
}

_CONSTANT: dict[str, Any] = {
    "architectures": ["HymbaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_hidden_size": -1,
    "attn_implementation": "flex",
    "attn_implementation_new": "flex",
    "auto_map": AUTO_MAP,
    "calc_logits_for_entire_prompt": False,
    "hidden_act": "silu",
    "kq_head_dim": -1,
    "kq_norm": "none",
    "kv_reuse_every_i_layer": -1,
    "kv_weight_reuse": False,
    "mamba_conv_bias": True,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "memory_tokens_interspersed_every": 0,
    "mlp_hidden_act": "silu",
    "model_type": "hymba",
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "num_mamba": 1,
    "output_router_logits": False,
    "rope": True,
    "router_aux_loss_coef": 0.001,
    "use_cache": False,
    "use_mamba_kernels": True,
}
"""What every Hymba has alike, as the published file spells it."""


@dataclass(frozen=True)
class TokenIds:
    """Ids of special tokens; the defaults are the published model's."""

    bos: int = 1
    eos: int = 2
    pad: int = 0

    @classmethod
    def of(cls, config_json: Mapping[str, Any]) -> TokenIds:
        """What a config.json gives; the defaults for those that it lacks or has as null."""
        given = {key: config_json.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
        return cls(**{key: value for key, value in given.items() if value is not None})


def require_exportable(model: ModelConfig) -> None:
    """Raises UserError, one line a key, for a model that the published format cannot express."""
    if obstacles := export_obstacles(model):
        raise UserError(*obstacles)


def hf_config(model: ModelConfig, dtype: str, token_ids: TokenIds, rope_type: str | None = None) -> dict[str, Any]:
    """Content of config.json, every key of the published one, sorted.

    Args:
        dtype: "bfloat16" or "float32"; written as ``torch_dtype`` (transformers 4) and ``dtype`` (5).
        rope_type: RoPE of the phase that the weights were trained in last; None: the model's.

    Raises UserError, one line a key, for a model that the format cannot express.
    """
    require_exportable(model)
    d, layers = ModelDims.of(model), resolve_stack(model)
    config = _CONSTANT | {
        "bos_token_id": token_ids.bos,
        "conv_dim": {str(x.index): d.inner_size for x in layers},
        "dtype": dtype,
        "eos_token_id": token_ids.eos,
        "global_attn_idx": list(model.global_layers),
        "hidden_size": d.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": d.ffn_hidden_size,
        "kv_reuse_group": [list(group) for group in model.kv_groups],
        "layer_type": [letter for x in layers for letter, mixer in LAYER_TYPES.items() if mixer == x.mixer],
        "mamba_d_conv": d.conv_width,
        "mamba_d_state": d.state_dim,
        "mamba_dt_rank": d.dt_rank,
        "mamba_expand": model.mamba_expand,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": d.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": d.num_kv_heads,
        "num_memory_tokens": d.num_meta_tokens,
        "orig_max_position_embeddings": model.rope_original_max_positions,
        "pad_token_id": token_ids.pad,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_type": rope_type or model.rope_type,
        "seq_length": model.max_position_embeddings,
        "sliding_window": model.window_size,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "v_head_dim": d.value_head_dim,
        "vocab_size": d.vocab_size,
    }
    if model.window_size is None:
        config["global_attn_idx"] = [x.index for x in layers]
    own = {  # keys of ours, where the published ones do not say it
        "attention_head_dim": model.kv_channels,
        "attention_v_head_dim": model.v_head_dim,
        "branch_fusion": None if model.branch_fusion == "mean" else model.branch_fusion,
    }
    config |= {key: value for key, value in own.items() if value is not None}
    if not all(x.has_ffn for x in layers):
        config["layer_has_mlp"] = [x.has_ffn for x in layers]
    return dict(sorted(config.items()))


def generation_config(token_ids: TokenIds) -> dict[str, Any]:
    """Content of generation_config.json. The cache is on: ours is exact, and without it every token costs a prompt."""
    return {
        "bos_token_id": token_ids.bos,
        "eos_token_id": token_ids.eos,
        "pad_token_id": token_ids.pad,
        "use_cache": True,
    }
