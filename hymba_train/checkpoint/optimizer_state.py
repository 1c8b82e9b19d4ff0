"""The optimizer as named tensors: float32 masters and both moments of every parameter, and one step count.

Megatron-Core's own state dicts differ between its plain and its distributed optimizer, carry parameter groups with
learning rates, and (0.19.2) the plain bf16 one numbers parameters wrongly where some are float32. Here a checkpoint
holds ``optimizer.state.{fp32_param,exp_avg,exp_avg_sq}.<name of the parameter>`` in true shapes, whatever wrote it, so
every layout, optimizer and learning rate loads every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
PREFIX = "optimizer.state."
MASTER = f"{PREFIX}fp32_param."
MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state(optimizer: Any, model: dict[str, Any], loading: bool) -> PlainState | DistributedState:
    """State of a Megatron-Core optimizer. ``model``: the model's sharded entries; ``loading``: without contents."""
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    kind = DistributedState if isinstance(optimizer, DistributedOptimizer) else PlainState
    return kind(optimizer, model, loading)


def optimizer_step(optimizer: Any) -> int:
    """Updates made so far: the step count of the parameter groups, 0 before the first one."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


class PlainState:
    """FP32Optimizer and Float16OptimizerWithFloat16Params: every rank holds the state of all its parameters."""

    def __init__(self, optimizer: Any, model: dict[str, Any], loading: bool) -> None:
        self.optimizer = optimizer
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)  # fills what is empty before the first step
        entries = {id(entry.data): entry for entry in nested_values(model)}
        self.tensors: dict[int, dict[str, Any]] = {
            number: {
                kind: make_sharded_optimizer_tensor(entries[id(param)], tensor, f"{PREFIX}{kind}")
                for kind, tensor in self._held(param, master).items()
            }
            for number, (param, master) in enumerate(self._masters())
        }

    def load(self, trees: list[dict], step: int) -> None:
        """Take over tensors that were loaded into (parts of) :attr:`tensors`, and the step count."""
        for number, (param, master) in enumerate(self._masters()):
            for kind, tensor in self._held(param, master).items():
                loaded = next(tree[number][kind] for tree in trees if kind in tree.get(number, {}))
                tensor.data.copy_(loaded)
        _set_step(self.optimizer, step)

    def _masters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(parameter of the model, float32 tensor that is updated): the same one for float32 parameters."""
        if not hasattr(self.optimizer, "fp32_from_float16_groups"):
            yield from ((param, param) for param in self.optimizer.get_parameters())
            return
        o = self.optimizer
        for params, masters in zip(o.float16_groups, o.fp32_from_float16_groups, strict=True):
            yield from zip(params, masters, strict=True)
        for params in o.fp32_from_fp32_groups:
            yield from ((param, param) for param in params)

    def _held(self, param: torch.Tensor, master: torch.Tensor) -> dict[str, torch.Tensor]:
        moments = self.optimizer.optimizer.state[master]
        held = {kind: moments[kind] for kind in MOMENTS}
        if master is not param:
            held["fp32_param"] = master
        return held


class DistributedState:
    """DistributedOptimizer: Megatron-Core gathers its shards into tensors of the parameters' shapes, and back."""

    def __init__(self, optimizer: Any, model: dict[str, Any], loading: bool) -> None:
        self.optimizer = optimizer
        with _places_without_padding(optimizer.buffers):
            self._rest = optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(SHARDING))
        self.tensors = _sharded_part(self._rest)
        for entry in nested_values(self.tensors):
            entry.key = entry.key.replace(f"{PREFIX}param.", MASTER)

    def load(self, trees: list[dict], step: int) -> None:
        """Take over tensors that were loaded into (parts of) :attr:`tensors`, and the step count."""
        for tree in trees:
            put_back(self._rest, tree)
        state = _unwrap(self._rest)
        for group in state["optimizer"]["param_groups"]:
            group["step"] = step
        self.optimizer.load_state_dict(state)
        _set_step(self.optimizer, step)


@contextmanager
def _places_without_padding(buffers: list) -> Iterator[None]:
    """Inside, buffers say where a parameter lies when the padding between buckets is left out.

    For a checkpoint Megatron-Core (0.19.2) gathers the state without that padding, and then cuts it up at places
    that count it: behind the first bucket whose size is no multiple of 128 every parameter would get its neighbour's
    masters and moments.
    """
    originals = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        starts = [0, *accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
        shifts = [start - bucket.offset for start, bucket in zip(starts, buffer.buckets, strict=False)]
        buffer.param_index_map = {
            param: (start + shifts[bucket], end + shifts[bucket], bucket)
            for param, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, original in zip(buffers, originals, strict=True):
            buffer.param_index_map = original


def weights_as_masters(tensors: dict, stored: set[str]) -> dict:
    """Take the masters that a checkpoint does not have out of ``tensors``; returns them as a tree of its own that reads
    the weights themselves.

    The plain optimizer stores masters of bf16 weights only, the distributed one of all; a float32 weight is its own
    master. Load the two trees one after the other: one tree must not read a name twice.
    """
    renamed = {}
    for key, value in list(tensors.items()):
        if isinstance(value, dict):
            part = weights_as_masters(value, stored)
            if part:
                renamed[key] = part
        elif value.key.startswith(MASTER) and not {t.key for t in sharded_tensors(value)} & stored:
            renamed[key] = replace(tensors.pop(key), key=value.key.removeprefix(MASTER))
    return renamed


def stored_masters_as_weights(model: dict[str, dict], stored: dict[str, Any]) -> dict[str, dict]:
    """Entries of the model tree whose weights are float32 here and narrower in the checkpoint, made to read its float32
    masters instead: a run that goes on in float32 loses nothing. ``stored``: tensors of the checkpoint by name."""

    def is_exact(entry: Any) -> bool:
        parts = sharded_tensors(entry)
        return bool(parts) and all(
            part.dtype == torch.float32 and part.key in stored and stored[part.key].dtype != torch.float32
            and f"{MASTER}{part.key}" in stored
            for part in parts
        )  # fmt: skip

    return {
        chunk: {k: replace(v, key=f"{MASTER}{v.key}") for k, v in entries.items() if is_exact(v)}
        for chunk, entries in model.items()
    }


def take_empty(tree: Any) -> dict:
    """Take the entries of which this rank holds nothing out of ``tree``; -> them, as what loading would have made."""
    taken = {}
    for key, value in list(_items(tree)):
        if isinstance(value, ShardedTensorFactory):
            if not sharded_tensors(value):
                taken[key] = value.merge_fn([])
        elif isinstance(value, (dict, list)):
            part = take_empty(value)
            if part:
                taken[key] = part
    for key in taken:
        if isinstance(tree[key], ShardedTensorFactory):
            del tree[key]
    return taken


def sharded_tensors(tree: Any) -> list[ShardedTensor]:
    """Every sharded tensor in ``tree``, factories resolved; other sharded objects are left out."""
    if isinstance(tree, ShardedTensorFactory):
        return sharded_tensors(tree.build())
    if isinstance(tree, ShardedTensor):
        return [tree]
    if isinstance(tree, (dict, list, tuple)):
        return [t for _, value in _items(tree) for t in sharded_tensors(value)]
    return []


def _set_step(optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["step"] = step


def _items(tree: Any) -> Any:
    return tree.items() if isinstance(tree, dict) else enumerate(tree)


def _sharded_part(tree: Any) -> dict:
    """Nested dicts with the sharded entries of ``tree`` alone; lists become dicts by index."""
    out = {}
    for key, value in _items(tree):
        if isinstance(value, ShardedBase):
            out[key] = value
        elif isinstance(value, (dict, list)):
            part = _sharded_part(value)
            if part:
                out[key] = part
    return out


def put_back(tree: Any, part: dict) -> None:
    """Put the entries of ``part`` (nested dicts; lists by index) into ``tree``."""
    for key, value in part.items():
        if isinstance(value, dict):
            put_back(tree.setdefault(key, {}) if isinstance(tree, dict) else tree[key], value)
        else:
            tree[key] = value


def _unwrap(tree: Any) -> Any:
    if isinstance(tree, LocalNonpersistentObject):
        return tree.unwrap()
    if isinstance(tree, dict):
        return {k: _unwrap(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_unwrap(v) for v in tree]
    return tree
