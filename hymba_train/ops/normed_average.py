"""Mean of the two branches' RMSNorms (hymba-architecture 2.9), which may be split over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def normed_average(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    true_width: int,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """(RMSNorm(attention) + RMSNorm(ssm)) / 2, in attention.dtype. Backend ``torch``.

    Args:
        attention, ssm: [..., channels], this rank's channels.
        attention_weight, ssm_weight: [channels].
        true_width: channels E of all ranks without padding, over which the mean square is taken.
        all_reduce: adds a float32 tensor [N, 2] up over the tensor-parallel ranks, in place; needed where the channels
            are split. It is called once forward (sums of squares) and once backward (their gradients).
    """
    wide = [t if t.dtype is torch.float64 else t.float() for t in (attention, ssm)]
    sums = torch.stack([t.square().sum(-1) for t in wide], -1)
    if all_reduce is not None:
        sums = SumOverRanks.apply(sums, all_reduce)
    scale = torch.rsqrt(sums / true_width + eps)
    normed = [
        (t * scale[..., i : i + 1]).to(attention.dtype) * weight.to(attention.dtype)
        for i, (t, weight) in enumerate(zip(wide, (attention_weight, ssm_weight), strict=True))
    ]
    return (normed[0] + normed[1]) / 2


class SumOverRanks(torch.autograd.Function):
    """The sum feeds every rank's channels: reduced forward, and backward again."""

    @staticmethod
    def forward(ctx, x, all_reduce):
        ctx.all_reduce = all_reduce
        total = x.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        ctx.all_reduce(total)
        return total, None
