"""Which heads a tensor-parallel rank computes. Plain Python, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hymba_train.describe.dims import ModelDims
from hymba_train.describe.parameters import partition


@dataclass(frozen=True)
class RankHeads:
    """Attention heads of one tensor-parallel rank."""

    count: int  # query heads, true ones
    capacity: int  # with padding
    kv_heads: range  # KV heads that they attend to, out of all
    kv_index: tuple[int, ...] | None
    """Place in kv_heads for each query head; None where query heads share them evenly, in order."""


def heads_of_rank(dims: ModelDims, tensor_size: int, tensor_rank: int) -> RankHeads:
    """Heads of rank ``tensor_rank`` of ``tensor_size``."""
    first, count, capacity = partition(dims.num_heads, tensor_size, tensor_rank)
    queries_per_kv = dims.num_heads // dims.num_kv_heads
    kv_heads = range(first // queries_per_kv, (first + count - 1) // queries_per_kv + 1)
    index = tuple(head // queries_per_kv - kv_heads.start for head in range(first, first + count))
    share, rest = divmod(count, len(kv_heads))
    even = not rest and index == tuple(head // share for head in range(count))
    return RankHeads(count, capacity, kv_heads, None if even else index)
