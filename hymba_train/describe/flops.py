"""Floating-point operations per text token, by part. The one place that knows these formulas.

Counted as MFU is usually reported: a multiply-add is 2, the backward pass costs twice the forward pass, padding and
recomputation are not counted, normalisation and elementwise work outside the scan is left out. The work of the meta
tokens is charged to the text tokens. Forward, for S text tokens behind M meta tokens (T = S + M)::

    T/S * 2 * (weights of the matrix products of all layers) + 2 * V * D
    + 2 * (dk + dv) * H / S * sum over attention layers of visible_keys(T)
    + T/S * E * (7N + 18) for each Mamba-1 branch: scan 7N + 10, convolution of width 4 with bias 8
    + T/S * (E * (5N + 10) + 8 * (E + width of B and C)) for each Mamba-2 layer, whose decay is one a head: what the
      recurrence takes, however much more the kernels spend on computing it as matrix products

which is 10.565 GFLOP per token, forward and backward, for the 1.5B at S = 2048.
"""

from __future__ import annotations

from collections.abc import Iterable

from hymba_train.config.schema import ModelConfig
from hymba_train.describe.dims import ModelDims
from hymba_train.describe.mixers import MIXERS
from hymba_train.describe.stack import LayerDescription, resolve_stack
from hymba_train.describe.tensors import layer_tensors

PARTS = ("in_proj", "out_proj", "ffn", "ssm_proj", "attention_local", "attention_global", "conv_scan", "head")
"""Parts of a FLOP count, in the order in which they are shown. ssm_proj is x_proj and dt_proj together, in Mamba-2
bc_proj."""

BACKWARD_FACTOR = 3
"""Forward and backward pass together, in units of the forward pass."""

_PART_OF_WEIGHT = {
    "mixer.in_proj.weight": "in_proj",
    "mixer.out_proj.weight": "out_proj",
    "ffn.linear_fc1.weight": "ffn",
    "ffn.linear_fc2.weight": "ffn",
}
"""Part of a matrix product's weight; those of a mixer that are not named here are ssm_proj."""


def visible_keys(num_positions: int, window: int | None, num_meta_tokens: int) -> int:
    """Pairs (query, key) that a layer computes over positions 0..num_positions-1, the meta tokens first.

    Key j is visible to query i if j <= i and (window is None or i - j <= window or j < num_meta_tokens)
    (hymba-architecture 2.7).

    >>> visible_keys(4, None, 0), visible_keys(4, 1, 0), visible_keys(4, 1, 1)
    (10, 7, 9)
    """
    if window is None or num_positions <= window + 1:
        return num_positions * (num_positions + 1) // 2
    beyond = num_positions - window - 1  # queries with keys outside the window: they see window + 1, and meta tokens
    within_meta = min(beyond, num_meta_tokens)
    meta = within_meta * (within_meta + 1) // 2 + (beyond - within_meta) * num_meta_tokens
    return (window + 1) * (window + 2) // 2 + beyond * (window + 1) + meta


def layer_flops(
    model: ModelConfig, layer: LayerDescription, seq_length: int, sequences_per_prefix: int = 1
) -> dict[str, float]:
    """Forward FLOPs per text token of one layer, by part.

    seq_length: text tokens S. sequences_per_prefix: sequences that share one computation of the meta prefix; 1 is the
    reference algorithm, the one that MFU is quoted for; a larger number gives the work that is really done.
    """
    d = ModelDims.of(model)
    rows_per_token = (seq_length + d.num_meta_tokens / sequences_per_prefix) / seq_length
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for tensor in layer_tensors(model, layer):
        if tensor.weight_decay:  # what decays is a matrix product's weight
            part = _PART_OF_WEIGHT.get(tensor.name, "ssm_proj")
            parts[part] += rows_per_token * 2 * tensor.num_parameters
    if layer.has_attention:
        everything = visible_keys(seq_length + d.num_meta_tokens, layer.window, d.num_meta_tokens)
        prefix = visible_keys(d.num_meta_tokens, layer.window, d.num_meta_tokens)
        pairs = everything - prefix + prefix / sequences_per_prefix
        work = 2 * (d.head_dim + d.value_head_dim) * d.num_heads * pairs / seq_length
        parts["attention_global" if layer.window is None else "attention_local"] += work
    parts["conv_scan"] += rows_per_token * MIXERS[layer.mixer].scan_flops(model)
    return parts


def head_flops(model: ModelConfig) -> float:
    """Forward FLOPs per text token of the output layer, over the true vocabulary."""
    return 2.0 * model.vocab_size * model.hidden_size


def flops_per_token(
    model: ModelConfig,
    seq_length: int,
    sequences_per_prefix: int = 1,
    layers: Iterable[LayerDescription] | None = None,
) -> dict[str, float]:
    """Forward FLOPs per text token of the whole model, by part; ``training_flops`` sums forward and backward."""
    total: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for layer in resolve_stack(model) if layers is None else layers:
        for part, flops in layer_flops(model, layer, seq_length, sequences_per_prefix).items():
            total[part] += flops
    total["head"] += head_flops(model)
    return total


def training_flops(model: ModelConfig, seq_length: int, sequences_per_prefix: int = 1) -> float:
    """FLOPs per text token of a training step, forward and backward: the numerator of MFU is tokens/s times this."""
    return BACKWARD_FACTOR * sum(flops_per_token(model, seq_length, sequences_per_prefix).values())
