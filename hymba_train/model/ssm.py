"""Mamba-1 branch with normed dt, B and C (hymba-architecture 2.4, 2.8); channels split over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from hymba_train.model.config import HymbaConfig
from hymba_train.model.norm import RMSNorm
from hymba_train.model.rows import MicroBatch


class Weights(nn.Module):
    """Bare parameters of a step that is an op rather than a module.

    Take them by calling it: with overlap_param_gather Megatron-Core waits for a parameter in the forward hook of the
    module that owns it, and what is read without a call may not have arrived.
    """

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self) -> Weights:
        return self


class SsmBranch(nn.Module):
    """Parameters live in the mixer's name space (mixer.conv.weight, mixer.A_log, ...): the mixer owns this as a part.

    Padding channels have zero weights everywhere, so that their output and all their gradients are zero.
    """

    def __init__(self, config: HymbaConfig, num_channels: int, conv_op, scan_op, tp_group) -> None:
        super().__init__()
        d, dtype = config.dims, config.params_dtype
        self.dt_rank, self.state_dim, self.tp_group = d.dt_rank, d.state_dim, tp_group
        self.conv_op, self.scan_op = conv_op, scan_op
        eps = config.layernorm_epsilon
        self.conv = Weights(
            weight=torch.empty(num_channels, d.conv_width, dtype=dtype), bias=torch.empty(num_channels, dtype=dtype)
        )
        self.x_proj = Weights(weight=torch.empty(d.dt_rank + 2 * d.state_dim, num_channels, dtype=dtype))
        self.dt_norm = RMSNorm(config, d.dt_rank, eps)
        self.B_norm = RMSNorm(config, d.state_dim, eps)
        self.C_norm = RMSNorm(config, d.state_dim, eps)
        self.dt_proj = Weights(weight=torch.empty(num_channels, d.dt_rank, dtype=dtype))
        self.dt_bias = nn.Parameter(torch.empty(num_channels, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(num_channels, d.state_dim, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(num_channels, dtype=torch.float32))

    def forward(self, x: Tensor, z: Tensor, batch: MicroBatch) -> Tensor:
        """x, z [N, 1, channels] -> gated scan output [N, 1, channels]."""
        rows = batch.rows
        u = self._convolve(x[:, 0], batch)
        s = reduce_from_tensor_model_parallel_region(F.linear(u, self.x_proj().weight), group=self.tp_group)
        dt, B, C = s.split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        normed = torch.cat((self.dt_norm(dt), self.B_norm(B), self.C_norm(C)), dim=-1)
        # Every rank's channels send a partial gradient back through dt, B and C. Summed here, after the norms, it is
        # whole when it reaches their weights, which therefore need no reduction of their own.
        normed = copy_to_tensor_model_parallel_region(normed, group=self.tp_group)
        dt, B, C = normed.split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        y = self._scan(u, F.linear(dt, self.dt_proj().weight), B, C, z[:, 0], batch)
        return rows.join(*y).unsqueeze(1)

    def _convolve(self, x: Tensor, batch: MicroBatch) -> Tensor:
        conv, rows = self.conv(), batch.rows
        weights = (conv.weight, conv.bias)
        meta, text = rows.split(x)
        meta, taps = self.conv_op(meta.unsqueeze(0), *weights, initial_taps=None, segment_ids=None)
        text, _ = self.conv_op(text, *weights, initial_taps=taps[0], segment_ids=batch.segment_ids)
        return rows.join(meta[0], text)

    def _scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        rows = batch.rows
        (mu, u), (mdt, dt), (mB, B), (mC, C), (mz, z) = (rows.split(t) for t in (u, dt, B, C, z))
        channel = (self.D, self.dt_bias)
        meta, state = self.scan_op(
            mu.unsqueeze(0), mdt.unsqueeze(0), self.A_log, mB.unsqueeze(0), mC.unsqueeze(0), *channel, mz.unsqueeze(0),
            initial_state=None, segment_ids=None,
        )  # fmt: skip
        text, _ = self.scan_op(
            u, dt, self.A_log, B, C, *channel, z, initial_state=state[0], segment_ids=batch.segment_ids
        )
        return meta[0], text
