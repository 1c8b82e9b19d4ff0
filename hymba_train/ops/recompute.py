"""A step that keeps its inputs alone and is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def recomputed(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """``function(*inputs)``, a tuple of tensors, of which autograd keeps only ``inputs`` (None among them is allowed).

    ``function`` must compute the same twice, and may communicate if all ranks run it alike.
    """
    return _Recomputed.apply(function, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        inputs = [None if x is None else x.detach() for x in ctx.saved_tensors]
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed and x is not None]
        for x in wanted:
            x.requires_grad_()
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        made = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
        outputs, gradients = zip(*made, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])
