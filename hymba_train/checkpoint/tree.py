"""Weights and RNG of a run as sharded tensors. Names are ours: ``decoder.layers.3.mixer.in_proj.weight...``."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from hymba_train.checkpoint.optimizer_state import SHARDING
from hymba_train.parallel.fp8_state import Fp8State
from hymba_train.parallel.runtime import Runtime


def model_tree(chunks: list) -> dict[str, Any]:
    """Weights of this process: ``chunks`` are its model chunks, wrapped in DistributedDataParallel."""
    return {f"model{i}": chunk.module.sharded_state_dict(metadata=dict(SHARDING)) for i, chunk in enumerate(chunks)}


def fp8_tree(chunks: list, runtime: Runtime) -> dict[str, ShardedTensor]:
    """Scales and amax histories of FP8's delayed scaling, as ``fp8.<module>.<tensor>``; every layout has the same."""
    replica = (0, runtime.tensor_rank, runtime.data_parallel_rank)
    return {
        name: ShardedTensor.from_rank_offsets(f"fp8.{name}", tensor, replica_id=replica)
        for name, tensor in Fp8State.of(chunk.module for chunk in chunks).tensors().items()
    }


def load_fp8_tree(chunks: list, loaded: dict[str, torch.Tensor]) -> None:
    """Put what was loaded into :func:`fp8_tree` in its place; without it, begin as a new run does."""
    state = Fp8State.of(chunk.module for chunk in chunks)
    if not loaded:
        state.reset()
        return
    for name, tensor in state.tensors().items():
        tensor.copy_(loaded[name])


def load_model_tree(chunks: list, loaded: dict[str, Any]) -> None:
    """Put loaded weights into the modules. Raises RuntimeError for a parameter that is missing or not known.

    Transformer Engine's modules also ask for an ``_extra_state``, a pickle, which no checkpoint of ours has: what is in
    it that matters is in :func:`fp8_tree`.
    """
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.module.load_state_dict(loaded[f"model{i}"], strict=False)
        missing = [name for name in missing if not name.endswith("._extra_state")]
        if missing or unexpected:
            raise RuntimeError(f"weights do not fit the model: missing {missing}, not known {unexpected}")


def rng_tree(rank: int, world_size: int) -> dict[str, ShardedTensor]:
    """RNG states of this process, one row each: torch's CPU generator and Megatron-Core's named CUDA states."""
    tracker = {name: state.detach().cpu() for name, state in get_cuda_rng_tracker().get_states().items()}
    states = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state().cpu(), **tracker}
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state.unsqueeze(0).contiguous(), (0, rank, world_size))
        for name, state in states.items()
    }


def load_rng_tree(loaded: dict[str, torch.Tensor]) -> None:
    """Restore what :func:`rng_tree` took, in the same layout."""
    rows = {name: row[0].clone() for name, row in loaded.items()}
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: rows[name] for name in tracker.get_states()})
    torch.cuda.set_rng_state(rows["cuda"])
    torch.set_rng_state(rows["cpu"])
