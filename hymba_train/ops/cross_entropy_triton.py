"""Output layer and cross-entropy on a GPU: logits in the weights' type, their gradient written over them.

Three passes over the logits in all: one forward (statistics), one read and one write backward. The products are
torch's. The weight's gradient goes straight into Megatron-Core's float32 ``main_grad`` where there is one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
from torch import Tensor

from hymba_train.ops.cross_entropy_kernels import loss_backward, loss_forward

FORWARD_BLOCK, FORWARD_WARPS = 4096, 8
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 8
"""Columns of a program (backward) or of one round of it (forward), and its warps."""


def linear_cross_entropy_triton(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """:func:`hymba_train.ops.cross_entropy.linear_cross_entropy`; backend ``triton``.

    If ``weight`` has a ``main_grad`` (float32, as Megatron-Core's buffers give it), the gradient is added to that in
    the backward pass, as its gradient_accumulation_fusion does: then autograd gets none if ``weight.zero_out_wgrad``
    (a tied weight, whose embedding still gives one), else a meaningless one with ``grad_added_to_main_grad`` set.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, vocab_size, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, with_grad):
        hidden, labels = hidden.contiguous(), labels.contiguous()
        loss, lse2 = (torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device) for _ in range(2))
        logits = hidden @ weight.t()
        _loss(logits, labels, loss, lse2, vocab_size)
        ctx.save_for_backward(hidden, weight, labels, lse2)
        ctx.vocab_size, ctx.main_grad_of = vocab_size, weight if hasattr(weight, "main_grad") else None
        ctx.logits = logits if with_grad and any(ctx.needs_input_grad) else None
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        hidden, weight, labels, lse2 = ctx.saved_tensors
        if ctx.logits is None:
            raise RuntimeError("linear_cross_entropy: the logits became their gradient in the first backward pass")
        logits, ctx.logits = ctx.logits, None
        _gradient_in_place(logits, labels, lse2, d_loss.float().contiguous(), ctx.vocab_size)
        return logits @ weight, _weight_gradient(logits, hidden, weight, ctx.main_grad_of), None, None, None


def _weight_gradient(d_logits: Tensor, hidden: Tensor, weight: Tensor, main_grad_of: Tensor | None) -> Tensor | None:
    """d_logits.T @ hidden, for autograd or in float32 into the main_grad of ``main_grad_of``."""
    left, owner = d_logits.t(), cast(Any, main_grad_of)  # with Megatron-Core's attributes
    if owner is None:
        return (left @ hidden).to(weight.dtype)
    total = owner.main_grad
    if hidden.dtype == torch.float32 or total.dtype != torch.float32 or not hidden.is_cuda:
        total.addmm_(left.to(total.dtype), hidden.to(total.dtype))
    else:
        torch.addmm(total, left, hidden, out_dtype=torch.float32, out=total)
    if getattr(owner, "zero_out_wgrad", False):
        return None
    owner.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def _loss(logits: Tensor, labels: Tensor, loss: Tensor, lse2: Tensor, vocab_size: int) -> None:
    if not logits.shape[0]:
        return
    with torch.cuda.device_of(logits):
        loss_forward[(logits.shape[0],)](
            logits, labels, loss, lse2, logits.stride(0), vocab_size, BLOCK=FORWARD_BLOCK, num_warps=FORWARD_WARPS
        )


def _gradient_in_place(logits: Tensor, labels: Tensor, lse2: Tensor, d_loss: Tensor, vocab_size: int) -> None:
    if not logits.shape[0]:
        return
    with torch.cuda.device_of(logits):
        loss_backward[(logits.shape[0], triton.cdiv(logits.shape[1], BACKWARD_BLOCK))](
            logits, labels, lse2, d_loss, logits.stride(0), vocab_size, logits.shape[1],
            BLOCK=BACKWARD_BLOCK, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
