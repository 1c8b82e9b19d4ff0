"""Norms of a mixer's branches, whose channels may be split over tensor-parallel ranks: the mean of two
(hymba-architecture 2.9), two side by side (branch_fusion=concat), and a gated one (Mamba-2). Plain torch on any device;
the latter two keep their inputs alone, and the backward pass computes them again."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.ops.recompute import recomputed

AllReduce = Callable[[Tensor], object]
"""Adds a float32 tensor up over the tensor-parallel ranks, in place; needed where the channels are split. It is called
once forward (sums of squares) and once backward (their gradients)."""


def normed_average(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    true_width: int,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """(RMSNorm(attention) + RMSNorm(ssm)) / 2, in attention.dtype. Backend ``torch``.

    Args:
        attention, ssm: [..., channels], this rank's channels.
        attention_weight, ssm_weight: [channels].
        true_width: channels E of all ranks without padding, over which the mean square is taken.
        all_reduce: of a tensor [..., 2].
    """
    a, s = _normed(attention, ssm, attention_weight, ssm_weight, eps, true_width, all_reduce)
    return (a + s) / 2


def normed_concat(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float,
    true_widths: tuple[int, int], all_reduce: AllReduce | None = None,
) -> Tensor:  # fmt: skip
    """RMSNorm(attention) and RMSNorm(ssm) side by side, in attention.dtype.

    As :func:`normed_average`, but for branches of unlike widths [..., A] and [..., E] and weights [A], [E].
    """
    widths = torch.tensor(true_widths, device=attention.device)

    def norm(attention, ssm, attention_weight, ssm_weight):
        return (torch.cat(_normed(attention, ssm, attention_weight, ssm_weight, eps, widths, all_reduce), -1),)

    return recomputed(norm, attention, ssm, attention_weight, ssm_weight)[0]


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, true_width: int, all_reduce: AllReduce | None = None
) -> Tensor:
    """RMSNorm(y silu(z)) over all channels, in y.dtype. y, z: [..., channels] of this rank; the rest as above."""

    def norm(y, z, weight):
        gated = _widened(y) * F.silu(_widened(z))
        scale = _scale(gated.square().sum(-1, keepdim=True), true_width, eps, all_reduce)
        return ((gated * scale).to(y.dtype) * weight.to(y.dtype),)

    return recomputed(norm, y, z, weight)[0]


def _normed(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float,
    true_width: int | Tensor, all_reduce: AllReduce | None,
) -> list[Tensor]:  # fmt: skip
    """The branches' RMSNorms; ``true_width``: of both, or one each."""
    wide = [_widened(t) for t in (attention, ssm)]
    sums = torch.stack([t.square().sum(-1) for t in wide], -1)
    scale = _scale(sums, true_width, eps, all_reduce)
    return [
        (t * scale[..., i : i + 1]).to(attention.dtype) * weight.to(attention.dtype)
        for i, (t, weight) in enumerate(zip(wide, (attention_weight, ssm_weight), strict=True))
    ]


def _widened(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _scale(sums: Tensor, true_width: int | Tensor, eps: float, all_reduce: AllReduce | None) -> Tensor:
    """1 / root mean square, from this rank's sums of squares."""
    if all_reduce is not None:
        sums = _SumOverRanks.apply(sums, all_reduce)
    return torch.rsqrt(sums / true_width + eps)


class _SumOverRanks(torch.autograd.Function):
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
