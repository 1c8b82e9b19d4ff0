"""Attention branch: RoPE, keys and values from here or from a producer, the attention op. It holds no weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba_train.describe import LayerDescription, ModelDims
from hymba_train.describe.heads import heads_of_rank
from hymba_train.model.ops import Ops
from hymba_train.model.rows import BatchContext
from hymba_train.ops.attention_rows import attention_rows


class AttentionBranch(nn.Module):
    """softmax attention of this rank's query heads (hymba-architecture 2.6 and 2.7).

    Padding heads are not computed: softmax over zero scores would be a mean of real values, not zero.
    """

    def __init__(self, dims: ModelDims, layer: LayerDescription, ops: Ops, tensor_size: int, tensor_rank: int) -> None:
        super().__init__()
        self.dims, self.window, self.ops = dims, layer.window, ops
        heads = heads_of_rank(dims, tensor_size, tensor_rank)
        self.num_heads, self.head_capacity, self.kv_heads = heads.count, heads.capacity, heads.kv_heads
        table = None if heads.kv_index is None else torch.tensor(heads.kv_index)
        self.register_buffer("kv_index", table, persistent=False)

    def rotate_keys(self, k: Tensor, batch: BatchContext) -> Tensor:
        """k [N, G*dk] before RoPE -> [N, 1, G*dk] after it: what a producer hands on."""
        rotated = self.ops.rotate_heads(k, batch.cos, batch.sin, k.shape[1] // self.dims.head_dim)
        return rotated.flatten(1).unsqueeze(1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: BatchContext) -> Tensor:
        """q [N, capacity*dk] before RoPE, k [N, 1, G*dk] after it, v [N, 1, G*dv] -> [N, 1, capacity*dv]."""
        d, rows = self.dims, batch.rows
        meta_q, text_q, _ = self.ops.rotate_heads(q, batch.cos, batch.sin, self.num_heads, rows.counts)
        out = attention_rows(
            self.ops.attention, meta_q, text_q, k.flatten(1), v.flatten(1), batch=rows.batch,
            window=self.window, scale=1 / math.sqrt(d.head_dim), kv_index=self.kv_index, segment_ids=batch.segment_ids,
            document_ends=batch.document_ends,
        ).unsqueeze(1)  # fmt: skip
        padding = (self.head_capacity - self.num_heads) * d.value_head_dim
        return F.pad(out, (0, padding)) if padding else out  # F.pad by nothing copies
