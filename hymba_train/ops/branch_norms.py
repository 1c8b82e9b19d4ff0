"""Norms of mixers, whose channels may be split over tensor-parallel ranks: two side by side (branch_fusion=concat), and
gated (Mamba-2). Plain torch on any device; the backward pass computes them again."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.ops.normed_average import SumOverRanks
from hymba_train.ops.recompute import recomputed

AllReduce = Callable[[Tensor], object]


def normed_concat(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float,
    true_widths: tuple[int, int], all_reduce: AllReduce | None = None,
) -> Tensor:  # fmt: skip
    """RMSNorm(attention) and RMSNorm(ssm) side by side, in attention.dtype.

    Args:
        attention [..., A], ssm [..., E]: this rank's channels. Weights: [A], [E].
        true_widths: channels of all ranks without padding, over which the mean squares are taken.
        all_reduce: as in :func:`hymba_train.ops.normed_average.normed_average`.
    """

    def norm(attention, ssm, attention_weight, ssm_weight):
        pairs = (attention, attention_weight), (ssm, ssm_weight)
        wide = [_widened(t) for t, _ in pairs]
        sums = torch.stack([t.square().sum(-1) for t in wide], -1)
        scale = _scale(sums, torch.tensor(true_widths, device=sums.device), eps, all_reduce)
        normed = [
            (t * scale[..., i : i + 1]).to(branch.dtype) * weight.to(branch.dtype)
            for i, (t, (branch, weight)) in enumerate(zip(wide, pairs, strict=True))
        ]
        return (torch.cat(normed, -1),)

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


def _widened(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _scale(sums: Tensor, true_width: int | Tensor, eps: float, all_reduce: AllReduce | None) -> Tensor:
    """1 / root mean square, from this rank's sums of squares."""
    if all_reduce is not None:
        sums = SumOverRanks.apply(sums, all_reduce)
    return torch.rsqrt(sums / true_width + eps)
