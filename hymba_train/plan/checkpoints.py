"""What checkpoints weigh: bytes on disk, and how often to save. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hymba_train.config.schema import Config

# 419 unexpected interruptions in 54 days on 16,384 GPUs (The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.4)
GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419
DISK_BYTES_PER_SECOND = 1e9  # assumed, all ranks together; `hymba doctor` measures one


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
