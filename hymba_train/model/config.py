"""Megatron-Core's TransformerConfig for a Hymba model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from hymba_train.config.schema import Config, ModelConfig
from hymba_train.describe import LayerDescription, ModelDims, capacity, resolve_stack

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class HymbaConfig(TransformerConfig):
    """TransformerConfig plus what Megatron-Core has no word for.

    Its own fields about attention heads only satisfy its checks: our modules read ``model`` and ``dims``.
    """

    model: ModelConfig = None
    dims: ModelDims = None
    layers: tuple[LayerDescription, ...] = field(default_factory=tuple)


def hymba_config(config: Config, device: torch.device) -> HymbaConfig:
    """TransformerConfig of a run. Every fusion is off that would need Transformer Engine, Apex or a GPU.

    With precision.fp8, Transformer Engine computes the four large products of a layer in FP8 (E4M3 forward, E5M2 for
    gradients); everything else stays in bf16. The plan has checked that it can.
    """
    model, parallel = config.model, config.parallel
    dims = ModelDims.of(model)
    dtype = DTYPES[config.precision.params]
    padded_heads = capacity(dims.num_heads, parallel.tensor) * parallel.tensor
    padded_ffn = capacity(dims.ffn_hidden_size, parallel.tensor) * parallel.tensor
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    fp8 = {}
    if config.precision.fp8:
        # A long history and its maximum: the setting of Transformer Engine's own default (used by delayed only).
        fp8 = dict(
            fp8="hybrid", fp8_recipe=config.precision.fp8, fp8_amax_history_len=1024,
            fp8_amax_compute_algo="max",
        )  # fmt: skip
    return HymbaConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=padded_heads,
        num_query_groups=padded_heads,
        kv_channels=dims.head_dim,
        ffn_hidden_size=padded_ffn,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        # With two stages, previous and next are one rank and batched p2p would swap the two directions.
        batch_p2p_comm=virtual is None,
        overlap_p2p_comm=virtual is not None,
        sequence_parallel=parallel.sequence,
        calculate_per_token_loss=True,
        use_cpu_initialization=device.type != "cuda",
        perform_initialization=False,  # model/init.py does it, equal for every layout
        deterministic_mode=config.run.deterministic,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,  # wrap_model turns it on where the linears are Transformer Engine's
        persist_layer_norm=False,
        **fp8,
        model=model,
        dims=dims,
        layers=tuple(resolve_stack(model)),
    )
