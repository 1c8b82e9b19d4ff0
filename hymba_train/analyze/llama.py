"""The opponent: a Llama-style Transformer of a Hymba's size, in transformers' own code."""

from __future__ import annotations

from typing import Any

import torch

from hymba_train.errors import UserError


def llama_config(hymba: Any, num_parameters: int, queries_per_group: int) -> Any:
    """LlamaConfig as deep and as wide as ``hymba`` (HymbaConfig), with its heads and vocabulary; the FFN takes what is
    left of ``num_parameters``, to a multiple of 64 (of 8 in a small model).

    Raises UserError if the heads do not divide by ``queries_per_group``.
    """
    from transformers import LlamaConfig

    heads, width, layers = hymba.num_attention_heads, hymba.hidden_size, hymba.num_hidden_layers
    if heads % queries_per_group:
        raise UserError(f"--llama-groups {queries_per_group}: the {heads} query heads do not divide by it")
    kv_heads = heads // queries_per_group
    embeddings = hymba.vocab_size * width * (1 if hymba.tie_word_embeddings else 2)
    attention = 2 * width * (heads + kv_heads) * hymba.head_dim
    left = (num_parameters - embeddings - width) / layers - attention - 2 * width
    ffn = left / (3 * width)
    multiple = 64 if ffn > 2048 else 8
    ffn = max(1, round(ffn / multiple)) * multiple
    return LlamaConfig(
        vocab_size=hymba.vocab_size, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hymba.head_dim,
        max_position_embeddings=hymba.max_position_embeddings, rms_norm_eps=hymba.rms_norm_eps,
        tie_word_embeddings=hymba.tie_word_embeddings, attn_implementation="sdpa",
        bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip


def make_llama(config: Any, dtype: torch.dtype, device: str) -> Any:
    """Random weights, in evaluation mode."""
    from transformers import LlamaForCausalLM

    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    return model.eval().requires_grad_(False)
