"""RMSNorm of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hymba_train.model.ops import Ops


class RMSNorm(nn.Module):
    """RMSNorm with a float32 weight. ``sequence_parallel``: its input is split over the tensor-parallel ranks, so the
    weight's gradient is a partial sum, which Megatron-Core's finalize_model_grads completes."""

    def __init__(self, config, hidden_size: int, eps: float, ops: Ops, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.eps, self.ops = eps, ops
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Norm of x [..., D]; with ``residual`` (residual + x, norm of that)."""
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps)
        return self.ops.add_rms_norm(residual, x, self.weight, self.eps)

    def of_sum(self, hidden: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden + added and its norm, in one go; None: there is nothing to add."""
        return (hidden, self(hidden)) if added is None else self(added, residual=hidden)
