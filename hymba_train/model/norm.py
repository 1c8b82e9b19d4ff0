"""RMSNorm of the residual stream and of the dt, B and C projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hymba_train.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm with a float32 weight. ``sequence_parallel``: its input is split over the tensor-parallel ranks, so the
    weight's gradient is a partial sum, which Megatron-Core's finalize_model_grads completes."""

    def __init__(self, config, hidden_size: int, eps: float, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
