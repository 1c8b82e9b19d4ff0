"""Rotary position embedding, half-split ("rotate-half"); hymba-architecture 2.6."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_tables(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [*positions.shape, head_dim / 2], of positions (int, any shape).

    ``base`` is the effective one (describe.dims.effective_rotary_base). Always float32: bf16 frequencies would turn
    position 8,319 by up to 9.5 rad too far (hymba-architecture 2.6).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / base**exponent)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., heads, dk] by the tables [..., dk / 2] of its positions; in x.dtype, the tables are cast to it."""
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_heads(
    x: Tensor, cos: Tensor, sin: Tensor, num_heads: int, counts: Sequence[int] | None = None
) -> Tensor | tuple[Tensor, ...]:
    """RoPE of the first num_heads heads in the columns of x [N, >= H*dk]: [N, H, dk], contiguous. Backend ``torch``.

    cos, sin: float32 [N, dk / 2] (:func:`rope_tables`). x may be a slice of wider rows; columns past the last head are
    those of padding heads. With ``counts``, which add up to N, so many rows each, one after another.
    """
    out = apply_rope(x[:, : num_heads * 2 * cos.shape[-1]].unflatten(-1, (num_heads, -1)), cos, sin)
    return out if counts is None else out.split(counts)
