"""Gradient buffers and the optimizer: Megatron-Core's DistributedDataParallel and its (distributed) AdamW."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from hymba_train.config.schema import Config
from hymba_train.parallel import finalize_model_grads
from hymba_train.parallel.runtime import Runtime
from hymba_train.train.adam import GroupStepAdamW, install_adam
from hymba_train.train.norm import install_norm


def wrap_model(
    config: Config, runtime: Runtime, chunks: list, bucket_size: int | None = None
) -> list[DistributedDataParallel]:
    """Model chunks with gradient buffers; bf16 weights get float32 gradients if precision.grad_reduce_in_fp32.

    bucket_size: parameters that are reduced together, where reductions overlap; None: Megatron-Core's choice.

    Also tells the schedules how gradients are finished and when communication overlaps. All chunks share one
    configuration object, as the interleaved schedule reads that of the first.
    """
    parallel, overlap_param_gather = config.parallel, gathers_in_forward(config)
    settings = chunks[0].pipeline_config()
    if config.precision.grad_reduce_in_fp32:
        _accumulate_in_the_product(chunks)
    # Interleaved chunks start their parameter gathers at one point of the schedule, and their reductions too, so that
    # no pipeline rank waits for another inside a data-parallel collective.
    aligned = len(chunks) > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        align_param_gather=aligned and overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        bucket_size=bucket_size,
    )
    wrapped = [
        # Only the first chunk is on the critical path: the others reduce in one bucket.
        DistributedDataParallel(settings, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=runtime.groups)
        for i, chunk in enumerate(chunks)
    ]

    def one_or_all(functions: list) -> Any:
        return functions if len(functions) > 1 else functions[0]

    settings.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        settings.no_sync_func = one_or_all([chunk.no_sync for chunk in wrapped])
        if aligned:
            settings.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    if overlap_param_gather and aligned:
        settings.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
    return wrapped


def gathers_in_forward(config: Config) -> bool:
    """Whether updated parameters arrive while the next forward pass runs. In a CUDA graph nobody waits for them."""
    return config.parallel.overlap_param_gather and not config.run.cuda_graph


def _accumulate_in_the_product(chunks: list) -> None:
    """Let Transformer Engine's linears add their weight gradients to the float32 buffer themselves, where the matrix
    product ends: no bf16 gradient is written, read and added. Only wrapped models have that buffer."""
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def build_optimizer(config: Config, runtime: Runtime, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with float32 master weights and moments.

    Weight decay follows the parameter descriptions (``TensorDescription.weight_decay``): matrices have it; norms,
    biases, A_log, D, dt bias, convolution and meta tokens have none. Rate and decay are written into the groups every
    step (:func:`hymba_train.train.schedules.set_hyperparameters`).
    """
    install_adam()
    install_norm()
    optim, parallel = config.optim, config.parallel
    bf16 = config.precision.params == "bf16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        # Megatron-Core measures the norm only where it clips: an infinite limit measures and leaves gradients alone.
        clip_grad=optim.clip_grad or math.inf,
        bf16=bf16,
        params_dtype=chunks[0].module.config.params_dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=gathers_in_forward(config),
    )
    no_decay = ParamPredicate("described without weight decay", lambda param: not param.apply_weight_decay)
    # The distributed optimizer looks masters up by their place in a group and miscounts in one that holds both types
    # (0.19.2), so float32 parameters of a bf16 model get groups of their own. start_wd is read by nobody here.
    float32 = ParamPredicate("float32 in a bf16 model", lambda param: bf16 and param.dtype is torch.float32)
    return get_megatron_optimizer(
        settings,
        chunks,
        config_overrides={
            ParamKey(predicate=no_decay): ParamGroupOverride(wd_mult=0.0),
            ParamKey(predicate=float32): ParamGroupOverride(start_wd=0.0),
        },
        use_gloo_process_groups=False,
        pg_collection=runtime.groups,
    )


def adams_of(optimizer: MegatronOptimizer) -> list[GroupStepAdamW]:
    """The optimizers that make the updates, inside of Megatron-Core's."""
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [adam for adam in inner if adam is not None]
