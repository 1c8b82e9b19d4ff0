"""What a step does with gradients once the backward pass is over."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads as megatron_finalize
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def finalize_model_grads(model: list, num_tokens: torch.Tensor | None = None, pg_collection=None, **kwargs) -> None:
    """Megatron-Core's reductions (data parallel, sequence-parallel norms, tied embeddings), then the sum over
    tensor-parallel ranks for weights that every rank holds whole and uses with heads of its own: replicated K/V, and B
    and C of Mamba-2 (parameters with ``partial_gradient_across_tp``).

    ``num_tokens`` is not used: the division by the tokens of the global batch would be a pass over all gradients, and
    the update makes it as it reads them (:mod:`hymba_train.train.step`).
    """
    megatron_finalize(model, None, pg_collection=pg_collection, **kwargs)
    _sum_partial_gradients(model, pg_collection.tp)


def _sum_partial_gradients(model: list, tp_group) -> None:
    if tp_group.size() == 1:
        return
    grads = [
        p.main_grad for chunk in model for p in chunk.parameters() if getattr(p, "partial_gradient_across_tp", False)
    ]
    if not grads:
        return
    flat = _flatten_dense_tensors(grads)
    dist.all_reduce(flat, group=tp_group)
    for grad, summed in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
        grad.copy_(summed)
