"""Small random models of the shipped Hugging Face code."""

from __future__ import annotations

import torch

from hymba_train.hf.configuration_hymba import HymbaConfig
from hymba_train.hf.modeling_hymba import HymbaForCausalLM

SMALL = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=6, intermediate_size=40, num_attention_heads=4,
    num_key_value_heads=2, num_memory_tokens=3, global_attn_idx=[0, 5], sliding_window=6, kv_reuse_group=[[1, 2, 3]],
    mamba_d_state=4, mamba_dt_rank=3, max_position_embeddings=256, orig_max_position_embeddings=64,
    initializer_range=0.3,
)  # fmt: skip


def make_model(seed=0, dtype=torch.float64, **changes):
    """A random model with no parameter at a special value, in evaluation mode; it generates with a cache, as exports
    do."""
    torch.manual_seed(seed)
    model = HymbaForCausalLM(HymbaConfig(**{**SMALL, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.generation_config.use_cache = True
    return model
