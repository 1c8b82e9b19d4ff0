"""config.json in both directions, and generation_config.json (hymba-architecture 1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hymba_train.config.schema import ModelConfig
from hymba_train.describe import ModelDims, export_obstacles, resolve_stack
from hymba_train.errors import UserError

AUTO_MAP = {
    "AutoConfig": "configuration_hymba.HymbaConfig",
    "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
}

LAYER_TYPES = {"h": "hybrid", "a": "attention", "m": "ssm"}
"""Letters of layer_type. The published code knows 'h'; ours, which every export carries, knows all."""

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

_MEANINGFUL = (
    "model_type", "hidden_act", "mlp_hidden_act", "kq_norm", "rope", "num_experts", "num_experts_per_tok",
    "mamba_conv_bias", "mamba_proj_bias", "mamba_inner_layernorms", "memory_tokens_interspersed_every",
    "attention_dropout",
)  # fmt: skip
"""Keys of _CONSTANT whose other values would be another model; a missing one takes the published value."""
_NULL_MEANS_THE_SAME = ("kq_norm", "memory_tokens_interspersed_every")


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


_ROPE_TYPES = {"ntk": "ntk", "default": "default", None: "default"}

_REQUIRED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "sliding_window", "global_attn_idx", "num_memory_tokens", "mamba_expand", "mamba_d_state", "mamba_d_conv",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip


def model_config_from_hf(config_json: Mapping[str, Any]) -> ModelConfig:
    """The published config.json (or one like it) as a ModelConfig.

    Raises UserError with a line for every key that is missing or asks for something we do not have. v_head_dim is not
    read: the published code overwrites it with mamba_expand * hidden_size / num_attention_heads (ours, with
    attention_v_head_dim where that is given).
    """
    problems = _constant_problems(config_json)
    problems += [f"config.json: {key} is missing" for key in _REQUIRED if key not in config_json]
    if problems := problems or _size_problems(config_json):
        raise UserError(*problems)
    get = config_json.get
    rank = get("mamba_dt_rank", "auto")
    return ModelConfig(
        name="hymba",
        num_layers=config_json["num_hidden_layers"],
        hidden_size=config_json["hidden_size"],
        ffn_hidden_size=config_json["intermediate_size"],
        num_attention_heads=config_json["num_attention_heads"],
        num_query_groups=config_json["num_key_value_heads"],
        vocab_size=config_json["vocab_size"],
        kv_channels=get("attention_head_dim"),
        v_head_dim=get("attention_v_head_dim"),
        layer_pattern=_layer_pattern(config_json),
        branch_fusion=get("branch_fusion", "mean"),
        global_layers=list(get("global_attn_idx") or []),
        kv_groups=[list(group) for group in get("kv_reuse_group") or []],
        window_size=config_json["sliding_window"],
        num_meta_tokens=config_json["num_memory_tokens"],
        mamba_expand=config_json["mamba_expand"],
        mamba_state_dim=config_json["mamba_d_state"],
        mamba_conv_width=config_json["mamba_d_conv"],
        mamba_dt_rank=None if rank == "auto" else rank,
        rotary_base=get("rope_theta", 10000.0),
        rope_type=_ROPE_TYPES[get("rope_type")],
        max_position_embeddings=config_json["max_position_embeddings"],
        rope_original_max_positions=get("orig_max_position_embeddings") or config_json["max_position_embeddings"],
        layernorm_epsilon=config_json["rms_norm_eps"],
        untie_embeddings_and_output_weights=not config_json["tie_word_embeddings"],
        init_method_std=get("initializer_range", 0.02),
    )


def _constant_problems(config_json: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in _MEANINGFUL:
        values = [_CONSTANT[key], *([None] if key in _NULL_MEANS_THE_SAME else [])]
        if config_json.get(key, values[0]) not in values:
            known = " or ".join(map(repr, values))
            problems.append(f"config.json: {key} = {config_json[key]!r} is not supported; only {known} is")
    return problems


def _size_problems(config_json: Mapping[str, Any]) -> list[str]:
    get, problems = config_json.get, []
    hidden, heads = config_json["hidden_size"], config_json["num_attention_heads"]
    if (get("attn_hidden_size") or -1) > 0 and get("attn_hidden_size") != hidden:
        problems.append(f"config.json: attn_hidden_size = {get('attn_hidden_size')} is not hidden_size ({hidden})")
    if (get("kq_head_dim") or -1) > 0 and get("kq_head_dim") * heads != hidden:
        problems.append(f"config.json: kq_head_dim = {get('kq_head_dim')} not hidden_size / heads = {hidden / heads:g}")
    if get("rope_type") not in _ROPE_TYPES:
        problems.append(f"config.json: rope_type = {get('rope_type')!r} is not supported; only 'ntk' or 'default' is")
    if not get("kv_reuse_group") and (get("kv_reuse_every_i_layer") or -1) > 0:
        problems.append("config.json: kv_reuse_every_i_layer is not supported; list the groups in kv_reuse_group")
    if get("branch_fusion", "mean") not in ("mean", "concat"):
        problems.append(f"config.json: branch_fusion = {get('branch_fusion')!r} is not supported; mean or concat is")
    if set(get("layer_type") or "h") - set(LAYER_TYPES):
        problems.append(f"config.json: layer_type has layers other than {', '.join(map(repr, LAYER_TYPES))}")
    for key in ("layer_type", "layer_has_mlp"):
        if get(key) and len(config_json[key]) != config_json["num_hidden_layers"]:
            problems.append(f"config.json: {key} does not have num_hidden_layers entries")
    return problems


def _layer_pattern(config_json: Mapping[str, Any]) -> list[str]:
    """The shortest pattern that gives the layers of layer_type and (a key of ours) layer_has_mlp."""
    num_layers = config_json["num_hidden_layers"]
    types = config_json.get("layer_type") or "h" * num_layers
    has_mlp = config_json.get("layer_has_mlp") or [True] * num_layers
    blocks = [LAYER_TYPES[t] + ("" if ffn else ":no_ffn") for t, ffn in zip(types, has_mlp, strict=True)]
    length = next(n for n in range(1, num_layers + 1) if all(b == blocks[i % n] for i, b in enumerate(blocks)))
    return blocks[:length]
