"""Sizes that follow from a ModelConfig (hymba-architecture 1.1 and 2.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hymba_train.config.schema import ModelConfig


@dataclass(frozen=True)
class ModelDims:
    """Derived sizes. Letters as everywhere: D hidden, E inner, N state, R dt rank, H query heads, G KV heads."""

    hidden_size: int  # D
    inner_size: int  # E: channels of the SSM branch, and width of all attention values together
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # dk, D / H unless set
    value_head_dim: int  # dv, E / H unless set
    state_dim: int  # N
    dt_rank: int  # R
    conv_width: int
    ffn_hidden_size: int  # F
    vocab_size: int  # V
    num_meta_tokens: int  # M

    @property
    def attention_size(self) -> int:
        """Width of all heads' values together: what an attention branch puts out."""
        return self.num_heads * self.value_head_dim

    @property
    def head_channels(self) -> int:
        """Channels of a Mamba-1 branch that go to one head's tensor-parallel rank: E / H."""
        return self.inner_size // self.num_heads

    @classmethod
    def of(cls, model: ModelConfig) -> ModelDims:
        """Dimensions of a model with every derived width filled in. Expects sizes that are given and divide."""
        inner = model.mamba_expand * model.hidden_size
        return cls(
            hidden_size=model.hidden_size,
            inner_size=inner,
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_query_groups,
            head_dim=model.kv_channels or model.hidden_size // model.num_attention_heads,
            value_head_dim=model.v_head_dim or inner // model.num_attention_heads,
            state_dim=model.mamba_state_dim,
            dt_rank=model.mamba_dt_rank or math.ceil(model.hidden_size / 16),
            conv_width=model.mamba_conv_width,
            ffn_hidden_size=model.ffn_hidden_size,
            vocab_size=model.vocab_size,
            num_meta_tokens=model.num_meta_tokens,
        )


def inner_size_in_words(model: ModelConfig) -> str:
    """Where E comes from, for error lines."""
    inner = model.mamba_expand * model.hidden_size
    return f"model.mamba_expand {model.mamba_expand} x model.hidden_size {model.hidden_size} = {inner}"


def padded_vocab_size(model: ModelConfig, tensor_parallel: int) -> int:
    """Vocabulary rows held in memory: the next multiple of make_vocab_size_divisible_by * tensor_parallel."""
    multiple = model.make_vocab_size_divisible_by * tensor_parallel
    return math.ceil(model.vocab_size / multiple) * multiple


def effective_rotary_base(model: ModelConfig, rope_type: str | None = None) -> float:
    """RoPE base b' (hymba-architecture 2.6).

    ``default``: rotary_base. ``ntk``: rotary_base * (2 * max / original - 1) ** (dk / (dk - 2)); 74,534.83 for 1.5B.
    Raises ValueError for another ``rope_type``.
    """
    rope_type = rope_type or model.rope_type
    if rope_type == "default":
        return model.rotary_base
    if rope_type == "ntk":
        dk = ModelDims.of(model).head_dim
        ratio = model.max_position_embeddings / model.rope_original_max_positions
        return model.rotary_base * (2 * ratio - 1) ** (dk / (dk - 2))
    raise ValueError(f"rope_type={rope_type!r}: known are 'default' and 'ntk'")
