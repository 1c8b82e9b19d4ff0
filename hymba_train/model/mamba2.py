"""Mamba-2 branch (arXiv 2405.21060, section 7): heads split over tensor-parallel ranks, B and C computed by every rank.

::

    hidden --in_proj--> x, z, dt          x --conv--.
    hidden --bc_proj--> B, C --bc_conv--------------+--> scan --> RMSNorm(y silu(z)) --> out_proj

Each rank's heads give B and C a part of their gradient: it is summed over the ranks once a step, as that of replicated
K/V is (hymba_train.parallel.gradients).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, distributed, nn

from hymba_train.describe.mixers.mamba2 import Mamba2Dims
from hymba_train.model.config import HymbaConfig
from hymba_train.model.ops import Ops
from hymba_train.model.rows import BatchContext
from hymba_train.model.weights import Weights, rows_on_every_rank
from hymba_train.ops.branch_norms import gated_rms_norm


class Mamba2Branch(nn.Module):
    """Everything between in_proj and out_proj. Parameters live in the mixer's name space, as in
    :class:`hymba_train.model.ssm.SsmBranch`."""

    def __init__(self, config: HymbaConfig, ops: Ops, tp_group) -> None:
        super().__init__()
        d, dtype = config.dims, config.params_dtype
        own = self.own = Mamba2Dims.of(config.model)
        self.config, self.ops, self.tp_group = config, ops, tp_group
        self.num_heads = own.num_heads // tp_group.size()
        heads_per_group = own.num_heads // own.num_groups
        first = tp_group.rank() * self.num_heads
        self.groups = slice(first // heads_per_group, (first + self.num_heads - 1) // heads_per_group + 1)
        channels, bc = self.num_heads * own.head_dim, own.bc_size
        self.conv = Weights(
            weight=torch.empty(channels, d.conv_width, dtype=dtype), bias=torch.empty(channels, dtype=dtype)
        )
        self.bc_proj = Weights(weight=torch.empty(bc, d.hidden_size, dtype=dtype))
        self.bc_conv = Weights(weight=torch.empty(bc, d.conv_width, dtype=dtype), bias=torch.empty(bc, dtype=dtype))
        for parameter in (*self.bc_proj.parameters(), *self.bc_conv.parameters()):
            parameter.partial_gradient_across_tp = True
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.gated_norm = Weights(weight=torch.empty(channels, dtype=torch.float32))

    def forward(self, hidden: Tensor, batch: BatchContext, x: Tensor, z: Tensor, dt: Tensor) -> Tensor:
        """hidden [N(/TP), 1, D], the mixer's input; x, z [N, channels], dt [N, heads] -> [N, 1, channels]."""
        d = self.config.dims
        bc = nn.functional.linear(rows_on_every_rank(hidden, self.config, self.tp_group), self.bc_proj().weight)
        B, C = self._conv(bc, self.bc_conv(), batch).split(self.own.bc_size // 2, dim=-1)
        y = self._scan(self._conv(x, self.conv(), batch), dt, B, C, batch)
        all_reduce = partial(distributed.all_reduce, group=self.tp_group) if self.tp_group.size() > 1 else None
        norm = self.gated_norm().weight
        return gated_rms_norm(y, z, norm, self.config.layernorm_epsilon, d.inner_size, all_reduce).unsqueeze(1)

    def _conv(self, rows: Tensor, conv: Weights, batch: BatchContext) -> Tensor:
        sizes = batch.rows
        return self.ops.causal_conv_rows(
            rows, conv.weight, conv.bias, num_meta=sizes.num_meta, batch=sizes.batch, seq=sizes.seq,
            segment_ids=batch.segment_ids, reach=batch.reach,
        )  # fmt: skip

    def _scan(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, batch: BatchContext) -> Tensor:
        """Flat rows in and out [N, channels]; every document starts from the state that the meta tokens leave."""
        own, rows = self.own, batch.rows
        B, C = (t.unflatten(-1, (own.num_groups, own.state_dim))[:, self.groups] for t in (B, C))
        (mx, x), (mdt, dt), (mB, B), (mC, C) = (
            rows.split(t) for t in (x.unflatten(-1, (self.num_heads, own.head_dim)), dt, B, C)
        )
        heads = (self.D, self.dt_bias)
        meta, state = self.ops.ssd_scan(
            mx.unsqueeze(0), mdt.unsqueeze(0), self.A_log, mB.unsqueeze(0), mC.unsqueeze(0), *heads,
            initial_state=None, segment_ids=None,
        )  # fmt: skip
        text, _ = self.ops.ssd_scan(
            x, dt, self.A_log, B, C, *heads, initial_state=state[0], segment_ids=batch.segment_ids
        )
        return rows.join(meta[0], text).flatten(1)
