"""RMSNorm in T5's order (hymba-architecture 2.2), alone, after a residual add, and over groups of columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [..., D] over its last axis and scale by weight [D]; result in x.dtype. Backend ``torch``.

    The order matters in bf16: x goes to float32 (float64 stays), is normalised, is cast *back* to x.dtype, and only
    then multiplied by the weight, cast to x.dtype as well.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x and its :func:`rms_norm`, both [..., D]. Backend ``torch``."""
    total = residual + x
    return total, rms_norm(total, weight, eps)


def group_rms_norm(x: Tensor, weights: Sequence[Tensor], eps: float, alignment: int = 1) -> Tensor:
    """:func:`rms_norm` of each group of columns by itself; backend ``torch``.

    x [..., W], one weight a group. Every group starts at the next multiple of ``alignment`` columns, and W is such a
    multiple; columns in between are ignored, and zero in the result.
    """
    widths = [w.shape[0] for w in weights]
    parts = x.split([aligned(width, alignment) for width in widths], dim=-1)
    normed = []
    for part, weight, width in zip(parts, weights, widths, strict=True):
        normed.append(rms_norm(part[..., :width], weight, eps))
        if part.shape[-1] > width:
            normed.append(x.new_zeros(*x.shape[:-1], part.shape[-1] - width))
    return torch.cat(normed, dim=-1)


def aligned(width: int, alignment: int) -> int:
    """The next multiple of ``alignment``."""
    return -(-width // alignment) * alignment
