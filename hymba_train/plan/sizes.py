"""What a model and its checkpoints weigh: cache at inference, bytes on disk, how often to save. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hymba_train.config.schema import Config, ModelConfig
from hymba_train.describe import LayerDescription, ModelDims

STATE_BYTES, VALUE_BYTES = 4, 2  # the scan's state is float32; keys, values and taps are bf16
# 419 unexpected interruptions in 54 days on 16,384 GPUs (The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.4)
GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419
DISK_BYTES_PER_SECOND = 1e9  # assumed, all ranks together; `hymba doctor` measures one


@dataclass(frozen=True)
class InferenceCache:
    """Bytes that one sequence keeps while it is generated, meta tokens included."""

    num_tokens: int
    kv_bytes: int
    state_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.state_bytes


def inference_cache(model: ModelConfig, layers: Iterable[LayerDescription], num_tokens: int) -> InferenceCache:
    """Cache of one sequence of ``num_tokens`` text tokens.

    Keys and values in bf16, only in layers that compute them; a local layer keeps its window and the meta tokens. The
    scan keeps [E, N] float32 and the convolution its last inputs, whatever the length.
    """
    d = ModelDims.of(model)
    kv = state = 0
    for layer in layers:
        if layer.has_attention and layer.kv_role != "consumer":
            seen = num_tokens if layer.window is None else min(num_tokens, layer.window + 1)
            kv += (d.num_meta_tokens + seen) * d.num_kv_heads * (d.head_dim + d.value_head_dim) * VALUE_BYTES
        if layer.has_ssm:
            state += d.inner_size * (d.state_dim * STATE_BYTES + (d.conv_width - 1) * VALUE_BYTES)
    return InferenceCache(num_tokens, kv, state)


@dataclass(frozen=True)
class CheckpointSizes:
    """Disk, and the interval between saves that loses least (Young 1974: sqrt(2 x save x time between failures))."""

    num_bytes: int  # one checkpoint: weights, float32 master weights, both moments
    save_seconds: float  # at DISK_BYTES_PER_SECOND
    hours_between_failures: float
    best_interval_seconds: float


def checkpoint_sizes(config: Config, num_parameters: int, world_size: int) -> CheckpointSizes:
    """Sizes for a run of ``world_size`` GPUs. Vocabulary padding and RNG states are left out: they are small."""
    per_parameter = 2 + 12 if config.precision.params == "bf16" else 4 + 8
    num_bytes = num_parameters * per_parameter
    save_seconds = num_bytes / DISK_BYTES_PER_SECOND
    hours = GPU_HOURS_PER_FAILURE / world_size
    return CheckpointSizes(num_bytes, save_seconds, hours, math.sqrt(2 * save_seconds * hours * 3600))
