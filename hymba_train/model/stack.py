"""The layers of one pipeline chunk, and the keys and values that cross its borders.

A KV group may straddle pipeline stages: K and V then travel behind the residual stream in the same message, as extra
columns, and their gradients come back the same way. Every message of a layout has the same width
(:func:`message_width`), so that Megatron-Core's schedules need no shape exchange.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from hymba_train.describe.heads import heads_of_rank
from hymba_train.describe.stack import kv_crossing
from hymba_train.model.config import HymbaConfig
from hymba_train.model.ops import Ops
from hymba_train.model.rows import BatchContext

SharedKv = dict[int, tuple[Tensor, Tensor]]


class HymbaStack(MegatronModule):
    """Layers ``layer_range`` of the model."""

    def __init__(
        self, config: HymbaConfig, spec: ModuleSpec, layer_range: range, ops: Ops, pg_collection, recompute: bool
    ) -> None:
        super().__init__(config)
        self.range, self.recompute = layer_range, recompute
        self.tp_group, self.tp_size = pg_collection.tp, pg_collection.tp.size()
        self.kv_widths = kv_columns(config, self.tp_size, pg_collection.tp.rank())
        self.layers = nn.ModuleList(
            build_module(spec, config, layer=config.layers[i], ops=ops, pg_collection=pg_collection)
            for i in layer_range
        )

    def forward(self, hidden: Tensor, batch: BatchContext, shared: SharedKv) -> tuple[Tensor, Tensor | None, SharedKv]:
        """hidden [N(/TP), 1, D]; shared: K/V of producers before this chunk. -> both, after it, and between them what
        is still to be added to hidden (None: nothing)."""
        shared = dict(shared)
        with get_fp8_context(self.config):
            hidden, added = self._layers(hidden, batch, shared)
        return hidden, added, shared

    def _layers(self, hidden: Tensor, batch: BatchContext, shared: SharedKv) -> tuple[Tensor, Tensor | None]:
        """Adds the K/V of this chunk's producers to ``shared``."""
        added = None
        for layer in self.layers:
            description = layer.layer
            kv = shared[description.kv_source] if description.kv_role == "consumer" else ()
            if self.recompute and self.training:
                hidden, *own_kv = self._recomputed(
                    lambda h, *kv, layer=layer: _alone(*layer(h, batch, *kv)), hidden, *kv
                )
            else:
                hidden, added, *own_kv = layer(hidden, batch, *kv, added=added)
            if description.kv_role == "producer":
                shared[description.index] = tuple(own_kv)
        return hidden, added

    def _recomputed(self, layer, *args: Tensor) -> tuple[Tensor, ...]:
        """Keeps ``args`` alone. FP8 scales must not move in the second forward pass: Transformer Engine sees to it."""
        if not self.config.fp8:
            return tensor_parallel.checkpoint(layer, False, *args)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        return te_checkpoint(layer, False, tensor_parallel.random.get_cuda_rng_tracker, self.tp_group, *args)

    def pack(self, hidden: Tensor, shared: SharedKv, width: int) -> Tensor:
        """Message to the next chunk: [N(/TP), 1, width] = residual stream | K, V of producers still needed | zeros."""
        parts = [hidden]
        for producer in kv_crossing(list(self.config.layers), self.range.stop):
            parts += [self._to_columns(t) for t in shared[producer]]
        used = sum(p.shape[-1] for p in parts)
        if used < width:
            parts.append(hidden.new_zeros(*hidden.shape[:-1], width - used))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else hidden

    def unpack(self, message: Tensor) -> tuple[Tensor, SharedKv]:
        """What :meth:`pack` of the chunk before put together."""
        d = self.config.hidden_size
        hidden, at, shared = message[..., :d], d, {}
        for producer in kv_crossing(list(self.config.layers), self.range.start):
            pair = []
            for width in self.kv_widths:
                pair.append(self._from_columns(message[..., at : at + width], width))
                at += width
            shared[producer] = tuple(pair)
        return hidden, shared

    def _to_columns(self, t: Tensor) -> Tensor:
        """K or V of all tokens [N, 1, w] as columns of a message, whose rows are split with sequence parallelism."""
        return t.reshape(t.shape[0] // self.tp_size, 1, -1) if self.config.sequence_parallel else t

    def _from_columns(self, columns: Tensor, width: int) -> Tensor:
        if not self.config.sequence_parallel:
            return columns
        return columns.reshape(columns.shape[0] * self.tp_size, 1, width // self.tp_size)


def _alone(hidden: Tensor, added: Tensor, *kv: Tensor) -> tuple[Tensor, ...]:
    """One tensor for the next layer to keep. A producer's V is a view of all that in_proj has made, which would outlive
    the layer with it."""
    return (hidden + added, *(t.contiguous() for t in kv))


def kv_columns(config: HymbaConfig, tensor_size: int, tensor_rank: int) -> tuple[int, int]:
    """Columns of a message that one producer's K and V take on this rank."""
    d = config.dims
    heads = len(heads_of_rank(d, tensor_size, tensor_rank).kv_heads)
    factor = tensor_size if config.sequence_parallel else 1
    return heads * d.head_dim * factor, heads * d.value_head_dim * factor


def message_width(config: HymbaConfig, chunk_starts: list[int], tensor_size: int, tensor_rank: int) -> int:
    """Columns of every message between chunks that start at these layers (the first chunk's start is no border)."""
    one = sum(kv_columns(config, tensor_size, tensor_rank))
    crossing = [len(kv_crossing(list(config.layers), start)) for start in chunk_starts if start > 0]
    return config.hidden_size + one * max(crossing, default=0)
