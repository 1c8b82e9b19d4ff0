"""Output layer and cross-entropy on a GPU: logits in the weights' type, their gradient written over them.

Three passes over the logits in all: one forward (statistics), one read and one write backward. The products are
torch's. The weight's gradient goes straight into Megatron-Core's float32 ``main_grad`` where there is one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hymba_train.ops.cross_entropy_kernels import loss_backward, loss_forward

CHUNK_ROWS = 4096
"""Rows of logits at a time, with ``recompute``."""
FORWARD_BLOCK, FORWARD_WARPS = 4096, 8
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 8
"""Columns of a program (backward) or of one round of it (forward), and its warps."""


def linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, *, recompute: bool = False
) -> Tensor:
    """:func:`hymba_train.ops.cross_entropy.linear_cross_entropy`; backend ``triton``.

    If ``weight`` has a ``main_grad`` (float32, as Megatron-Core's buffers give it), the gradient is added to that in
    the backward pass, as its gradient_accumulation_fusion does: then autograd gets none if ``weight.zero_out_wgrad``
    (a tied weight, whose embedding still gives one), else a meaningless one with ``grad_added_to_main_grad`` set.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, vocab_size, recompute, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, recompute, with_grad):
        hidden, labels = hidden.contiguous(), labels.contiguous()
        n = hidden.shape[0]
        loss, lse2 = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(2))
        ctx.rows = CHUNK_ROWS if recompute else max(n, 1)
        logits = None
        for part in _chunks(n, ctx.rows):
            logits = hidden[part] @ weight.t()
            _loss(logits, labels[part], loss[part], lse2[part], vocab_size)
        ctx.save_for_backward(hidden, weight, labels, lse2)
        ctx.vocab_size, ctx.main_grad_of = vocab_size, weight if hasattr(weight, "main_grad") else None
        ctx.logits = logits if with_grad and not recompute and any(ctx.needs_input_grad) else None
        ctx.recompute = recompute
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        hidden, weight, labels, lse2 = ctx.saved_tensors
        if not ctx.recompute and ctx.logits is None:
            raise RuntimeError("linear_cross_entropy: the logits became their gradient in the first backward pass")
        d_loss = d_loss.float().contiguous()
        d_hidden = torch.empty_like(hidden)
        target = _WeightGradient(weight, ctx.main_grad_of, once=not ctx.recompute)
        for part in _chunks(hidden.shape[0], ctx.rows):
            logits = hidden[part] @ weight.t() if ctx.recompute else ctx.logits
            _gradient_in_place(logits, labels[part], lse2[part], d_loss[part], ctx.vocab_size)
            torch.mm(logits, weight, out=d_hidden[part])
            target.add(logits, hidden[part])
        ctx.logits = None
        return d_hidden, target.result(), None, None, None, None


class _WeightGradient:
    """Sum of products d_logits.T @ hidden in float32, in main_grad or in memory of its own. ``once``: of one only."""

    def __init__(self, weight: Tensor, main_grad_of: Tensor | None, once: bool) -> None:
        owner: Any = main_grad_of  # with Megatron-Core's attributes
        self.weight, self.owner, self.once = weight, owner, once
        self.sum: Tensor | None = None if owner is None else owner.main_grad

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        left = d_logits.t()
        if self.owner is None and self.once:
            self.sum = left @ hidden
            return
        if self.sum is None:
            self.sum = torch.zeros(self.weight.shape, dtype=torch.float32, device=hidden.device)
        if hidden.dtype == torch.float32 or self.sum.dtype != torch.float32 or not hidden.is_cuda:
            self.sum.addmm_(left.to(self.sum.dtype), hidden.to(self.sum.dtype))
        else:
            torch.addmm(self.sum, left, hidden, out_dtype=torch.float32, out=self.sum)

    def result(self) -> Tensor | None:
        if self.owner is None:
            return None if self.sum is None else self.sum.to(self.weight.dtype)
        if getattr(self.owner, "zero_out_wgrad", False):
            return None
        self.owner.grad_added_to_main_grad = True
        return torch.empty_like(self.weight)


def _chunks(n: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _loss(logits: Tensor, labels: Tensor, loss: Tensor, lse2: Tensor, vocab_size: int) -> None:
    with torch.cuda.device_of(logits):
        loss_forward[(logits.shape[0],)](
            logits, labels, loss, lse2, logits.stride(0), vocab_size, BLOCK=FORWARD_BLOCK, num_warps=FORWARD_WARPS
        )


def _gradient_in_place(logits: Tensor, labels: Tensor, lse2: Tensor, d_loss: Tensor, vocab_size: int) -> None:
    with torch.cuda.device_of(logits):
        loss_backward[(logits.shape[0], triton.cdiv(logits.shape[1], BACKWARD_BLOCK))](
            logits, labels, lse2, d_loss, logits.stride(0), vocab_size, logits.shape[1],
            BLOCK=BACKWARD_BLOCK, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
