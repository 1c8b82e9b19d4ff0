"""One parameter described: shape, cut over tensor-parallel ranks, decay, names.

Shapes are the true ones: no padding. A tensor that is cut consists of one or more *slices* along one axis; each slice
has ``units`` pieces of ``unit_size`` rows that stay together (a head, a channel) and is dealt to the ranks by
:func:`partition`.  in_proj of a producer, say, is ::

    | q: 25 x 64 | k: 5 x 64 | v: 5 x 128 | x: 25 x 128 | z: 25 x 128 |     (hymba-architecture 2.3)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict


@dataclass(frozen=True)
class Slice:
    """A part of a tensor along its cut axis.

    ``kv``: dealt by KV head, or replicated if those do not divide. ``block_multiple``: dealt in equal blocks of a
    multiple of this, all padding on the last ranks (the vocabulary); None: dealt evenly by :func:`partition`.
    """

    name: str
    units: int
    unit_size: int = 1
    kv: bool = False
    block_multiple: int | None = None

    @property
    def size(self) -> int:
        return self.units * self.unit_size

    def is_replicated(self, ranks: int) -> bool:
        """Whether every one of ``ranks`` tensor-parallel ranks holds all of it: KV heads that do not divide."""
        return self.kv and kv_is_replicated(self.units, ranks)

    def part(self, ranks: int, rank: int) -> tuple[int, int, int]:
        """(first, count, capacity) in units, of one rank."""
        if self.block_multiple is None:
            return partition(self.units, ranks, rank)
        capacity = math.ceil(self.units / (self.block_multiple * ranks)) * self.block_multiple
        first = min(rank * capacity, self.units)
        return first, min(capacity, self.units - first), capacity


@dataclass(frozen=True)
class TensorDescription:
    """One parameter. ``axis`` is the axis that tensor parallelism cuts, None if every rank holds it whole."""

    name: str  # ours, below the layer or the model
    shape: tuple[int, ...]
    hf_name: str  # in the published checkpoint (hymba-architecture 4.1), below the layer or the model; '': not there
    axis: int | None = None
    slices: tuple[Slice, ...] = ()
    weight_decay: bool = False
    float32: bool = False  # kept in float32 whatever precision.params says

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def cut_axis(self) -> int:
        """:attr:`axis`, of a tensor that has one."""
        assert self.axis is not None, self.name
        return self.axis


class Cut(TypedDict):
    """Where tensors of one kind are cut alike: keyword arguments of :class:`TensorDescription`."""

    axis: int
    slices: tuple[Slice, ...]


def partition(units: int, ranks: int, rank: int) -> tuple[int, int, int]:
    """(first, count, capacity): units that ``rank`` really holds, and room per rank (count or count + 1; rest zero).

    >>> [partition(25, 2, r) for r in (0, 1)]
    [(0, 12, 13), (12, 13, 13)]
    """
    first, last = units * rank // ranks, units * (rank + 1) // ranks
    return first, last - first, capacity(units, ranks)


def capacity(units: int, ranks: int) -> int:
    """Room for units on each rank, zero padding included: what :func:`partition` gives every rank alike."""
    return math.ceil(units / ranks)


def kv_is_replicated(num_kv_heads: int, tensor_size: int) -> bool:
    """Whether every tensor-parallel rank holds the K/V projections of all KV heads: their number does not divide."""
    return num_kv_heads % tensor_size != 0


def norm_tensor(name: str, size: int, hf_name: str) -> TensorDescription:
    """Weight of a norm over ``size`` values, whole on every rank, in float32."""
    return TensorDescription(name, (size,), hf_name, float32=True)


def held_parameters(tensor: TensorDescription, tensor_parallel: int) -> int:
    """Elements of a tensor that one tensor-parallel rank allocates: cut, padded, or whole if it is not cut.

    KV heads that do not divide over the ranks are held whole by every rank.
    """
    if tensor.axis is None:
        return tensor.num_parameters
    held = 0
    for part in tensor.slices:
        units = part.units if part.is_replicated(tensor_parallel) else part.part(tensor_parallel, 0)[2]
        held += units * part.unit_size
    return held * tensor.num_parameters // tensor.shape[tensor.axis]
