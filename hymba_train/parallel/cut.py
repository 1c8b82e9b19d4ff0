"""How tensor parallelism cuts a parameter: slice by slice, in whole units, with zero padding that stays zero.

A rank holds, of every slice of a :class:`TensorDescription`, the units that :func:`describe.partition` deals to it,
followed by zero rows up to the common capacity. 25 heads so run at TP 1, 2, 4 and 5. KV heads are dealt like query
heads where their number divides; where it does not, every rank holds all of them in a parameter of its own
(``kv_proj``), computes the ones its query heads need, and gradients are summed over the ranks once a step
(:mod:`hymba_train.parallel.gradients`).

Checkpoints hold true shapes only, one entry a slice, so that any layout loads any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from hymba_train.config.schema import ModelConfig
from hymba_train.describe import LayerDescription, Slice, TensorDescription, layer_tensors


@dataclass(frozen=True)
class LocalSlice:
    """The part of one slice that one rank holds. All figures in rows along the cut axis."""

    name: str
    local_start: int  # first row in the rank's tensor
    capacity: int  # rows there, zero padding included
    count: int  # true rows
    start: int  # first true row within the slice
    size: int  # true rows of the whole slice
    full_start: int  # first row of the slice in the full tensor


@dataclass(frozen=True)
class LocalTensor:
    """One rank's part of a described parameter."""

    description: TensorDescription
    slices: tuple[LocalSlice, ...]
    replicated: bool  # every tensor-parallel rank holds the same

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.description.shape)
        if self.slices:
            shape[self.description.axis] = sum(s.capacity for s in self.slices)
        return tuple(shape)

    def __getitem__(self, name: str) -> LocalSlice:
        return next(s for s in self.slices if s.name == name)

    def take(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of the true tensor ``full``, padding zero."""
        if not self.slices:
            return full.clone()
        axis = self.description.axis
        local = full.new_zeros(self.shape)
        for s in self.slices:
            source = full.narrow(axis, s.full_start + s.start, s.count)
            local.narrow(axis, s.local_start, s.count).copy_(source)
        return local

    def padding(self, local: torch.Tensor) -> list[torch.Tensor]:
        """Views of the rows that must stay zero."""
        axis = self.description.axis
        return [
            local.narrow(axis, s.local_start + s.count, s.capacity - s.count)
            for s in self.slices
            if s.capacity > s.count
        ]


def local_tensor(
    tensor: TensorDescription,
    tensor_size: int,
    tensor_rank: int,
    slices: tuple[Slice, ...] | None = None,
    replicate: bool = False,
) -> LocalTensor:
    """Part of ``tensor`` on one rank; ``slices`` restricts it to some of them (in_proj without K/V, or only K/V)."""
    if tensor.axis is None:
        return LocalTensor(tensor, (), True)
    wanted = tensor.slices if slices is None else slices
    out, local_start, full_start = [], 0, 0
    for s in tensor.slices:
        if s in wanted:
            first, count, capacity = (0, s.units, s.units) if replicate else s.part(tensor_size, tensor_rank)
            u = s.unit_size
            out.append(LocalSlice(s.name, local_start, capacity * u, count * u, first * u, s.size, full_start))
            local_start += capacity * u
        full_start += s.size
    return LocalTensor(tensor, tuple(out), replicate)


def layer_cuts(
    model: ModelConfig, layer: LayerDescription, tensor_size: int, tensor_rank: int
) -> dict[str, LocalTensor]:
    """Name below the layer -> this rank's part, for every parameter of a layer.

    Where KV heads do not divide, in_proj's K/V slices become ``mixer.kv_proj.weight``, whole on every rank.
    """
    cuts: dict[str, LocalTensor] = {}
    for tensor in layer_tensors(model, layer):
        kv = tuple(s for s in tensor.slices if s.is_replicated(tensor_size))
        if kv:
            rest = tuple(s for s in tensor.slices if s not in kv)
            own = tensor.name.replace("in_proj", "kv_proj")
            cuts[own] = local_tensor(tensor, tensor_size, tensor_rank, kv, replicate=True)
            cuts[tensor.name] = local_tensor(tensor, tensor_size, tensor_rank, rest)
        else:
            cuts[tensor.name] = local_tensor(tensor, tensor_size, tensor_rank)
    return cuts


def sharded(
    local: LocalTensor, key: str, param: torch.Tensor, replica_id: tuple[int, int, int]
) -> ShardedTensor | ShardedTensorFactory:
    """Checkpoint entry of ``param``: true shapes, one entry a slice (``key.slice`` where there are several).

    ``param`` itself is handed over, not a view: the optimizer finds its state by identity.
    """
    if not local.slices:
        return ShardedTensor.from_rank_offsets(key, param, replica_id=replica_id)
    axis, several = local.description.axis, len(local.description.slices) > 1

    held = [s for s in local.slices if s.count]  # a rank's vocabulary block may be padding alone

    def build(key, tensor, replica_id, flattened_range):
        return [_chunk(key, several, s, axis, tensor, replica_id) for s in held]

    def merge(parts):
        # The optimizer's float32 masters and moments of a bf16 parameter come this way too: keep what was stored.
        out = (parts[0] if parts else param).new_zeros(local.shape)
        for s, part in zip(held, parts, strict=True):
            out.narrow(axis, s.local_start, s.count).copy_(part)
        return out

    return ShardedTensorFactory(key, param, build, merge, replica_id)


def _chunk(key, several, s: LocalSlice, axis, tensor, replica_id) -> ShardedTensor:
    data = tensor.narrow(axis, s.local_start, s.count)
    global_shape, offset = list(data.shape), [0] * data.ndim
    global_shape[axis], offset[axis] = s.size, s.start
    return ShardedTensor(
        key=f"{key}.{s.name}" if several else key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=tuple(global_shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,  # ranks may hold one unit more or less than others
        replica_id=replica_id,
    )
