"""Gradient norm for Megatron-Core where neither Transformer Engine nor Apex is installed.

Its own fall-back takes ``torch.norm`` of every gradient in float32. On a CPU that loses small squares against the sum
so far (-3e-5 for 2 million values), by an amount that depends on how parameters are cut, so layouts would clip
differently; on a GPU it makes the host wait once a parameter. Here squares are added up in float64, on the device.
"""

from __future__ import annotations

import torch


def l2_norm(
    chunk_size: int, noop_flag: object, tensor_lists: list[list[torch.Tensor]], per_tensor: bool, *args: object
) -> tuple[torch.Tensor, None]:
    """Euclidean norm of all values of ``tensor_lists[0]``: (float32 [1], None), with amp_C.multi_tensor_l2norm's
    arguments, of which only the tensors matter."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms)).float().reshape(1), None


def install_norm() -> None:
    """Make Megatron-Core use :func:`l2_norm` if it found no fused kernel. Idempotent."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
