"""Megatron-Core's TransformerConfig for a Hymba model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from hymba_train.config.schema import Config, ModelConfig
from hymba_train.describe import LayerDescription, ModelDims, resolve_stack
from hymba_train.errors import UserError
from hymba_train.parallel.cut import kv_is_replicated

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class HymbaConfig(TransformerConfig):
    """TransformerConfig plus what Megatron-Core has no word for.

    Its own fields about attention heads only satisfy its checks: our modules read ``model`` and ``dims``.
    """

    model: ModelConfig = None
    dims: ModelDims = None
    layers: tuple[LayerDescription, ...] = field(default_factory=tuple)

    @property
    def kv_replicated(self) -> bool:
        """K/V projections are held whole by every rank: the KV heads do not divide by the tensor-parallel size."""
        return kv_is_replicated(self.dims.num_kv_heads, self.tensor_model_parallel_size)


def hymba_config(config: Config, device: torch.device) -> HymbaConfig:
    """TransformerConfig of a run. Every fusion is off that would need Transformer Engine, Apex or a GPU.

    Raises UserError for FP8.
    """
    if config.precision.fp8:
        raise UserError(
            f"precision.fp8={config.precision.fp8}: FP8 is planned, but cannot be trained yet; use precision=bf16"
        )
    model, parallel = config.model, config.parallel
    dims = ModelDims.of(model)
    dtype = DTYPES[config.precision.params]
    padded_heads = -(-dims.num_heads // parallel.tensor) * parallel.tensor
    padded_ffn = -(-dims.ffn_hidden_size // parallel.tensor) * parallel.tensor
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
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
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        model=model,
        dims=dims,
        layers=tuple(resolve_stack(model)),
    )
