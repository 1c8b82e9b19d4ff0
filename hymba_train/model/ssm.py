"""Mamba-1 branch with normed dt, B and C (hymba-architecture 2.4, 2.8); channels split over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from hymba_train.describe import capacity
from hymba_train.describe.saved import GROUP_ALIGNMENT
from hymba_train.model.config import HymbaConfig
from hymba_train.model.ops import Ops
from hymba_train.model.rows import BatchContext
from hymba_train.model.weights import Weights
from hymba_train.ops.rms_norm import aligned
from hymba_train.ops.selective_scan_rows import selective_scan_rows


class _AlignGroups(torch.autograd.Function):
    """Rows of a weight in groups of ``widths``, each followed by zero rows up to a multiple of GROUP_ALIGNMENT."""

    @staticmethod
    def forward(ctx, weight, widths):
        ctx.widths = widths
        parts = []
        for part, width in zip(weight.split(widths), widths, strict=True):
            parts.append(part)
            if width % GROUP_ALIGNMENT:
                parts.append(weight.new_zeros(-width % GROUP_ALIGNMENT, weight.shape[1]))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, d_out):
        parts = d_out.split([aligned(width, GROUP_ALIGNMENT) for width in ctx.widths])
        return torch.cat([part[:width] for part, width in zip(parts, ctx.widths, strict=True)]), None


class _Project(torch.autograd.Function):
    """u [N, C], weight [K, C] -> u @ weight.T and u. The gradient from the second use is what the matrix product of the
    backward pass adds to, in place, rather than a third tensor that both are summed into.

    That gradient must be nobody else's: the one of hymba_train.ops.gradient_slots' splits is not.
    """

    @staticmethod
    def forward(ctx, u, weight):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, weight)
        return F.linear(u, weight), u.view_as(u)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_u):
        u, weight = ctx.saved_tensors
        if d_out is None:
            return d_u, None
        d_u = d_out @ weight if d_u is None else d_u.addmm_(d_out, weight)
        return d_u, d_out.t() @ u


class SsmBranch(nn.Module):
    """Parameters live in the mixer's name space (mixer.conv.weight, mixer.A_log, ...): the mixer owns this as a part.

    Padding channels have zero weights everywhere, so that their output and all their gradients are zero.
    """

    def __init__(self, config: HymbaConfig, ops: Ops, tp_group) -> None:
        super().__init__()
        d, dtype = config.dims, config.params_dtype
        num_channels = capacity(d.num_heads, tp_group.size()) * d.head_channels
        self.dt_rank, self.state_dim, self.tp_group = d.dt_rank, d.state_dim, tp_group
        self.ops, self.eps = ops, config.layernorm_epsilon
        self.conv = Weights(
            weight=torch.empty(num_channels, d.conv_width, dtype=dtype), bias=torch.empty(num_channels, dtype=dtype)
        )
        self.x_proj = Weights(weight=torch.empty(d.dt_rank + 2 * d.state_dim, num_channels, dtype=dtype))
        self.dt_norm = Weights(weight=torch.empty(d.dt_rank, dtype=torch.float32))
        self.B_norm = Weights(weight=torch.empty(d.state_dim, dtype=torch.float32))
        self.C_norm = Weights(weight=torch.empty(d.state_dim, dtype=torch.float32))
        self.dt_proj = Weights(weight=torch.empty(num_channels, d.dt_rank, dtype=dtype))
        self.dt_bias = nn.Parameter(torch.empty(num_channels, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(num_channels, d.state_dim, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(num_channels, dtype=torch.float32))

    def forward(self, hidden: Tensor, batch: BatchContext, x: Tensor, z: Tensor) -> Tensor:
        """x, z [N, channels] -> gated scan output [N, 1, channels]. ``hidden``, the mixer's input, is not used."""
        rows, conv = batch.rows, self.conv()
        u = self.ops.causal_conv_rows(
            x, conv.weight, conv.bias, num_meta=rows.num_meta, batch=rows.batch, seq=rows.seq,
            segment_ids=batch.segment_ids, reach=batch.reach,
        )  # fmt: skip
        norms = (self.dt_norm().weight, self.B_norm().weight, self.C_norm().weight)
        weight = _AlignGroups.apply(self.x_proj().weight, [w.shape[0] for w in norms])
        s, u = _Project.apply(u, weight)
        s = reduce_from_tensor_model_parallel_region(s, group=self.tp_group)
        normed = self.ops.group_rms_norm(s, norms, self.eps, GROUP_ALIGNMENT)
        # Every rank's channels send a partial gradient back through dt, B and C. Summed here, after the norms, it is
        # whole when it reaches their weights, which therefore need no reduction of their own.
        normed = copy_to_tensor_model_parallel_region(normed, group=self.tp_group)
        room = [aligned(w.shape[0], GROUP_ALIGNMENT) for w in norms]
        dt, B, C = normed.split(room, dim=-1)
        if room[1] > self.state_dim:
            B, C = B[:, : self.state_dim], C[:, : self.state_dim]
        weight = self.dt_proj().weight
        if room[0] > self.dt_rank:
            weight = F.pad(weight, (0, room[0] - self.dt_rank))
        y = selective_scan_rows(
            self.ops.selective_scan, u, F.linear(dt, weight), self.A_log, B, C, self.D, self.dt_bias, z,
            num_meta=rows.num_meta, batch=rows.batch, seq=rows.seq, segment_ids=batch.segment_ids,
        )  # fmt: skip
        return y.unsqueeze(1)
