"""RoPE on a GPU, straight from a slice of in_proj's output; the backward pass turns the other way. One pass each.

Nothing but the tables is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba_train.errors import UserError
from hymba_train.ops.gradient_slots import slot_of

ROWS, VALUES_PER_THREAD = 2, 8
"""Rows of a program, and values of each half of a row that a thread holds: eight of bf16 are 16 bytes."""


def rotate_heads_triton(
    x: Tensor, cos: Tensor, sin: Tensor, num_heads: int, counts: Sequence[int] | None = None
) -> Tensor | tuple[Tensor, ...]:
    """:func:`hymba_train.ops.rope.rotate_heads`; backend ``triton``. Needs a head width that is a power of two,
    else UserError.

    The gradients of all ``counts`` are turned back into one tensor, x's slot if it has one.
    """
    half = cos.shape[-1]
    if half & (half - 1):
        raise UserError(f"rope: backend 'triton' needs a power of two as head width, not {2 * half}; use 'torch'")
    return _Rotate.apply(x, cos, sin, num_heads, counts, slot_of(x))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, num_heads, counts, slot):
        x = x if x.stride(1) == 1 else x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.num_heads, ctx.slot, ctx.shape, ctx.like = num_heads, slot, x.shape, (x.dtype, x.device)
        ctx.counts = [x.shape[0]] if counts is None else counts
        out = torch.empty(x.shape[0], num_heads, 2 * cos.shape[-1], dtype=x.dtype, device=x.device)
        _launch(x, cos, sin, out, num_heads, x.stride(0), out.stride(0), backward=False)
        return out if counts is None else out.split(counts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d_parts):
        cos, sin = ctx.saved_tensors
        dtype, device = ctx.like
        dx = torch.empty(ctx.shape, dtype=dtype, device=device) if ctx.slot is None else ctx.slot.take()
        width = ctx.num_heads * 2 * cos.shape[-1]
        if ctx.shape[1] > width:  # columns of padding heads, which are not rotated
            dx[:, width:].zero_()
        parts = zip(d_parts, dx.split(ctx.counts), cos.split(ctx.counts), sin.split(ctx.counts), strict=True)
        for d_out, place, part_cos, part_sin in parts:
            if d_out is None:
                place.zero_()
                continue
            if d_out.stride(2) != 1 or d_out.stride(1) != d_out.shape[2]:
                d_out = d_out.contiguous()
            rows = d_out.flatten(1)
            _launch(rows, part_cos, part_sin, place, ctx.num_heads, rows.stride(0), place.stride(0), backward=True)
        return dx, None, None, None, None, None


def _launch(x, cos, sin, out, num_heads, stride_x, stride_o, *, backward: bool) -> None:
    n, half = x.shape[0], cos.shape[-1]
    block = triton.next_power_of_2(num_heads)
    if n:
        with torch.cuda.device_of(x):
            rotate[(triton.cdiv(n, ROWS),)](
                x, cos, sin, out, stride_x, stride_o, n, HEADS=num_heads, HALF=half,
                HEADS_BLOCK=block, ROWS=ROWS, BACKWARD=backward,
                num_warps=min(16, max(1, block * half // (32 * VALUES_PER_THREAD))),
            )  # fmt: skip


@triton.jit
def rotate(
    X, COS, SIN, OUT, stride_x, stride_o, num_rows,
    HEADS: tl.constexpr, HALF: tl.constexpr, HEADS_BLOCK: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """out = x turned by the row's angles (back, if BACKWARD); the tables are rounded to x's type, as in torch."""
    head, j = tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < HEADS) & (j < HALF)
    at = head * (2 * HALF) + j
    for i in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        valid = row < num_rows
        ok = inside & valid
        table = row * HALF + j
        cos = tl.load(COS + table, mask=valid & (j < HALF), other=0.0).to(X.dtype.element_ty).to(tl.float32)
        sin = tl.load(SIN + table, mask=valid & (j < HALF), other=0.0).to(X.dtype.element_ty).to(tl.float32)
        if BACKWARD:
            sin = -sin
        first = tl.load(X + row * stride_x + at, mask=ok, other=0.0).to(tl.float32)
        second = tl.load(X + row * stride_x + at + HALF, mask=ok, other=0.0).to(tl.float32)
        place = OUT + row * stride_o + at
        tl.store(place, (first * cos - second * sin).to(OUT.dtype.element_ty), mask=ok)
        tl.store(place + HALF, (second * cos + first * sin).to(OUT.dtype.element_ty), mask=ok)
