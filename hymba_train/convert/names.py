"""Names and settings of the published checkpoint, and ours (hymba-architecture 1.1 and 4.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.tensors import TensorDescription
from hymba_train.errors import UserError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def hf_parts(description: TensorDescription) -> list[tuple[str, tuple[int, ...]]]:
    """(published name, published shape) of the tensors that make up one of ours, in the order of its rows."""
    name, shape = description.hf_name, description.shape
    if "{" in name:
        before, _, rest = name.partition("{")
        alternatives, _, after = rest.partition("}")
        rows = [s.size for s in description.slices]
        names = [before + part + after for part in alternatives.split(",")]
        return [(n, (r, *shape[1:])) for n, r in zip(names, rows, strict=True)]
    if name.endswith("conv1d.weight"):
        shape = (shape[0], 1, shape[1])
    return [(name, shape)]


def checkpoint_keys(description: TensorDescription) -> list[tuple[str, tuple[int, ...]]]:
    """(key, shape) in our checkpoints: the tensor, or each of its slices where it has several (parallel/cut.py)."""
    if len(description.slices) < 2:
        return [(description.name, description.shape)]
    shapes = [list(description.shape) for _ in description.slices]
    for shape, piece in zip(shapes, description.slices, strict=True):
        shape[description.cut_axis] = piece.size
    return [(f"{description.name}.{s.name}", tuple(shape)) for s, shape in zip(description.slices, shapes, strict=True)]


def checkpoint_entries(description: TensorDescription, full: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) in our checkpoints of one described tensor ``full``, in its true shape."""
    keys = [key for key, _ in checkpoint_keys(description)]
    parts = [full] if len(keys) == 1 else full.split([s.size for s in description.slices], dim=description.cut_axis)
    yield from zip(keys, parts, strict=True)


_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("hymba",),
    "hidden_act": ("silu",),
    "mlp_hidden_act": ("silu",),
    "kq_norm": ("none", None),
    "rope": (True,),
    "num_experts": (1,),
    "num_experts_per_tok": (1,),
    "mamba_conv_bias": (True,),
    "mamba_proj_bias": (False,),
    "mamba_inner_layernorms": (True,),
    "memory_tokens_interspersed_every": (0, None),
    "attention_dropout": (0.0,),
}
"""Keys with the values we implement. A missing key takes the published model's value, not the class default."""

LAYER_TYPES = {"h": "hybrid", "a": "attention", "m": "ssm"}
"""Letters of layer_type. The published code knows 'h'; ours, which every export carries, knows all."""

_ROPE_TYPES = {"ntk": "ntk", "default": "default", None: "default"}


def model_config_from_hf(config_json: Mapping[str, Any]) -> ModelConfig:
    """The published config.json (or one like it) as a ModelConfig.

    Raises UserError with a line for every key that is missing or asks for something we do not have. v_head_dim is not
    read: the published code overwrites it with mamba_expand * hidden_size / num_attention_heads (ours, with
    attention_v_head_dim where that is given).
    """
    problems = [
        f"config.json: {key} = {config_json[key]!r} is not supported; only {' or '.join(repr(v) for v in values)} is"
        for key, values in _FIXED.items()
        if key in config_json and config_json[key] not in values
    ]
    problems += [f"config.json: {key} is missing" for key in _REQUIRED if key not in config_json]
    if problems:
        raise UserError(*problems)
    problems = _size_problems(config_json)
    if problems:
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


_REQUIRED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "sliding_window", "global_attn_idx", "num_memory_tokens", "mamba_expand", "mamba_d_state", "mamba_d_conv",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip


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
