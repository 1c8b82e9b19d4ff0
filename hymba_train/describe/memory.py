"""What a rank holds: parameters with their padding, and an estimate of activations."""

from __future__ import annotations

import math

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims
from hymba_train.describe.stack import LayerDescription
from hymba_train.describe.tensors import TensorDescription, partition


def held_parameters(tensor: TensorDescription, tensor_parallel: int) -> int:
    """Elements of a tensor that one tensor-parallel rank allocates: cut, padded, or whole if it is not cut.

    KV heads that do not divide over the ranks are held whole by every rank.
    """
    if tensor.axis is None:
        return tensor.num_parameters
    held = 0
    for part in tensor.slices:
        replicated = part.kv and part.units % tensor_parallel
        units = part.units if replicated else part.part(tensor_parallel, 0)[2]
        held += units * part.unit_size
    return held * tensor.num_parameters // tensor.shape[tensor.axis]


def layer_activation_values(
    model: ModelConfig, layer: LayerDescription, tensor_parallel: int = 1, sequence_parallel: bool = False
) -> float:
    """Values that one layer keeps per token for its backward pass, on one tensor-parallel rank.

    An estimate (nothing recomputed, nothing fused beyond the obvious): layer input, both norms' outputs and the
    residual are D wide; q is D; k and v as wide as the layer's KV heads; SSM input, gate, convolution, time step, scan
    output, attention output and their average E each; x_proj's output; the gated FFN 3F; and one float32 state of the
    scan every 64 tokens, as two values of half that size. 99 kB a token for the 1.5B in bf16.
    """
    d = ModelDims.of(model)
    heads = partition(d.num_heads, tensor_parallel, 0)[2] / d.num_heads
    stream = 1 / tensor_parallel if sequence_parallel else 1
    values = 2 * d.hidden_size * stream  # layer input, normalised
    if layer.has_attention:
        values += heads * (d.hidden_size + d.inner_size)  # q, attention output
        if layer.kv_role != "consumer":
            kv_heads = d.num_kv_heads / tensor_parallel if d.num_kv_heads % tensor_parallel == 0 else d.num_kv_heads
            values += kv_heads * (d.head_dim + d.value_head_dim)
    if layer.has_ssm:
        values += heads * 5 * d.inner_size + d.dt_rank + 2 * d.state_dim
        values += heads * d.inner_size * d.state_dim * 2 / 64
    if layer.mixer == "hybrid":
        values += heads * d.inner_size
    if layer.has_ffn:
        values += 2 * d.hidden_size * stream + 3 * math.ceil(d.ffn_hidden_size / tensor_parallel)
    return values
