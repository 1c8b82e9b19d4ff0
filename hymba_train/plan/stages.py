"""Cutting the stack into model chunks for pipeline parallelism.

Chunk c, counted in the order of the layers, is virtual stage c // PP of pipeline rank c % PP (Megatron-Core's
interleaved schedule; with one chunk a rank, chunk and rank are the same).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hymba_train.describe import LayerDescription, kv_crossing

TIE = 0.02
"""Splits whose slowest chunk is within this share of the best count as equal: FLOPs predict time no better."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that one pipeline rank runs in one go."""

    index: int  # in the order of the layers
    layers: range
    pipeline_rank: int
    virtual_rank: int
    flops_per_token: float  # forward; the last chunk includes the output layer


@dataclass(frozen=True)
class Border:
    """Where one chunk hands over to the next. K/V of producers that later layers consume travel along."""

    layer: int  # first layer behind the border
    kv_producers: tuple[int, ...]
    kv_width: int  # values per token that travel besides the residual stream, all heads


def make_chunks(counts: Sequence[int], pipeline: int, layer_costs: Sequence[float], head_cost: float) -> list[Chunk]:
    """Chunks from the number of layers in each."""
    chunks, first = [], 0
    for index, count in enumerate(counts):
        layers = range(first, first + count)
        cost = sum(layer_costs[i] for i in layers) + (head_cost if index == len(counts) - 1 else 0.0)
        chunks.append(Chunk(index, layers, index % pipeline, index // pipeline, cost))
        first += count
    return chunks


def make_borders(layers: list[LayerDescription], chunks: Sequence[Chunk], kv_width: int) -> list[Border]:
    """Borders between chunks; ``kv_width`` is what one producer's keys and values take, G * (dk + dv)."""
    borders = []
    for chunk in chunks[1:]:
        producers = kv_crossing(layers, chunk.layers.start)
        borders.append(Border(chunk.layers.start, producers, kv_width * len(producers)))
    return borders


def balance(
    layers: list[LayerDescription], num_chunks: int, layer_costs: Sequence[float], head_cost: float
) -> list[int]:
    """Layers per chunk such that the dearest chunk is as cheap as can be; every chunk has at least one layer.

    Among splits within TIE of the best, the one with the fewest KV groups cut by borders is taken, and among those the
    one with the least sum of squared costs. Costs are forward FLOPs; the last chunk bears ``head_cost`` too.
    Exact, by dynamic programming over (chunks, layers): O(chunks * layers ** 2). Raises ValueError: more chunks than
    layers, or none.
    """
    if not 1 <= num_chunks <= len(layers):
        raise ValueError(f"{len(layers)} layers cannot fill {num_chunks} chunks")
    prefix = [0.0]
    for cost in layer_costs:
        prefix.append(prefix[-1] + cost)

    def chunk_cost(first: int, last: int) -> float:
        return prefix[last] - prefix[first] + (head_cost if last == len(layers) else 0.0)

    cuts = [len(kv_crossing(layers, border)) for border in range(len(layers))]
    best = _dynamic_program(len(layers), num_chunks, chunk_cost, cuts, None)[0][0]
    limit = best * (1 + TIE)
    return _dynamic_program(len(layers), num_chunks, chunk_cost, cuts, limit)[1]


def _dynamic_program(
    num_layers: int, num_chunks: int, chunk_cost: Callable[[int, int], float], cuts: Sequence[int], limit: float | None
) -> tuple[tuple[float, ...], list[int]]:
    """((score), layers per chunk): score is (dearest chunk,) without a limit, else (KV groups cut, sum of squares)."""
    # layers placed -> best score, counts
    table: dict[int, tuple[tuple[float, ...], list[int]]] = {0: ((0.0,) if limit is None else (0, 0.0), [])}
    for chunk in range(num_chunks):
        following: dict[int, tuple[tuple[float, ...], list[int]]] = {}
        room = num_layers - (num_chunks - chunk - 1)  # each later chunk needs a layer
        for placed, (score, counts) in table.items():
            ends = range(placed + 1, room + 1) if chunk < num_chunks - 1 else [num_layers]
            for end in ends:
                cost = chunk_cost(placed, end)
                new: tuple[float, ...]
                if limit is None:
                    new = (max(score[0], cost),)
                elif cost > limit:
                    continue
                else:
                    new = (score[0] + (cuts[placed] if placed else 0), score[1] + cost * cost)
                if end not in following or new < following[end][0]:
                    following[end] = (new, [*counts, end - placed])
        table = following
    return table[num_layers]


def bubble_fraction(pipeline: int, virtual_pipeline: int, num_micro_batches: int) -> float:
    """Share of a step in which a pipeline rank waits: (PP - 1) / (VPP * micro-batches + PP - 1)."""
    idle = pipeline - 1
    return idle / (virtual_pipeline * num_micro_batches + idle)
