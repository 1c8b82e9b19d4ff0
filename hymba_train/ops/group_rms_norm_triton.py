"""RMSNorm of up to three groups of columns on a GPU, for x_proj's dt, B and C: one small kernel each way."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba_train.errors import UserError
from hymba_train.ops.rms_norm import aligned
from hymba_train.ops.rows_triton import as_rows

ROWS, WARPS = 16, 4
"""Rows of a program, and its warps."""
MAX_GROUPS = 3


def group_rms_norm_triton(x: Tensor, weights: Sequence[Tensor], eps: float, alignment: int = 1) -> Tensor:
    """:func:`hymba_train.ops.rms_norm.group_rms_norm`; backend ``triton``. Raises UserError for more than 3 groups."""
    if len(weights) > MAX_GROUPS or x.shape[-1] > 1024:
        raise UserError(f"group_rms_norm: backend 'triton' takes {MAX_GROUPS} groups, 1024 columns in all; use 'torch'")
    return _GroupNorm.apply(x, eps, alignment, *weights)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, alignment, *weights):
        rows = as_rows(x)
        n, width = rows.shape
        ctx.widths = [w.shape[0] for w in weights]
        ctx.room = [aligned(w, alignment) for w in ctx.widths]
        if sum(ctx.room) != width:
            raise ValueError(f"groups {ctx.widths} aligned to {alignment} columns do not fill {width}")
        starts = [sum(ctx.room[:i]) for i in range(len(weights))] + [width] * (MAX_GROUPS - len(weights))
        ends = [start + w for start, w in zip(starts, ctx.widths, strict=False)] + [width] * (MAX_GROUPS - len(weights))
        ctx.constants = dict(
            END0=ends[0], START1=starts[1], END1=ends[1], START2=starts[2], END2=ends[2], WIDTH=width, ROWS=ROWS,
            BLOCK=triton.next_power_of_2(width), num_warps=WARPS,
        )  # fmt: skip
        pieces = []
        for weight, room in zip(weights, ctx.room, strict=True):
            pieces.append(weight.float())
            if room > weight.shape[0]:
                pieces.append(_zeros(room - weight.shape[0], weight.device))
        weight = torch.cat(pieces)
        out = torch.empty(n, width, dtype=x.dtype, device=x.device)
        ctx.save_for_backward(rows, weight)
        ctx.eps, ctx.shape, ctx.dtypes = eps, x.shape, [w.dtype for w in weights]
        if n:
            with torch.cuda.device_of(x):
                group_forward[(triton.cdiv(n, ROWS),)](rows, weight, out, rows.stride(0), n, eps, **ctx.constants)
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        rows, weight = ctx.saved_tensors
        (n, width), d_out = rows.shape, as_rows(d_out)
        dx = torch.empty(n, width, dtype=rows.dtype, device=rows.device)
        partial = torch.empty(triton.cdiv(n, ROWS), width, dtype=torch.float32, device=rows.device)
        if n:
            with torch.cuda.device_of(rows):
                group_backward[(triton.cdiv(n, ROWS),)](
                    rows, weight, d_out, dx, partial, rows.stride(0), d_out.stride(0), n, ctx.eps, **ctx.constants
                )
        parts = zip(partial.sum(0).split(ctx.room), ctx.widths, ctx.dtypes, strict=True)
        return dx.view(ctx.shape), None, None, *(part[:width].to(dtype) for part, width, dtype in parts)


@functools.cache
def _zeros(width: int, device: torch.device) -> Tensor:
    return torch.zeros(width, device=device)


@triton.jit
def _group_mean(
    x, c, END0: tl.constexpr, START1: tl.constexpr, END1: tl.constexpr, START2: tl.constexpr, END2: tl.constexpr
):
    """Mean over the columns of each column's group, for every column of x [ROWS, BLOCK]; zero between groups."""
    first, second, third = c < END0, (c >= START1) & (c < END1), (c >= START2) & (c < END2)
    mean = tl.where(first, tl.sum(tl.where(first, x, 0.0), 1)[:, None] / END0, 0.0)
    if END1 > START1:
        mean = tl.where(second, tl.sum(tl.where(second, x, 0.0), 1)[:, None] / (END1 - START1), mean)
    if END2 > START2:
        mean = tl.where(third, tl.sum(tl.where(third, x, 0.0), 1)[:, None] / (END2 - START2), mean)
    return mean


@triton.jit
def group_forward(
    X, W, OUT, stride, num_rows, eps,
    END0: tl.constexpr, START1: tl.constexpr, END1: tl.constexpr, START2: tl.constexpr, END2: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W is zero between groups, and so the result."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    ok = (row < num_rows) & (c < WIDTH)
    grouped = (c < END0) | ((c >= START1) & (c < END1)) | ((c >= START2) & (c < END2))
    x = tl.where(grouped, tl.load(X + row * stride + c, mask=ok, other=0.0).to(tl.float32), 0.0)
    w = tl.load(W + c, mask=c < WIDTH, other=0.0).to(OUT.dtype.element_ty).to(tl.float32)
    normed = x * (1.0 / tl.sqrt(_group_mean(x * x, c, END0, START1, END1, START2, END2) + eps))
    out = normed.to(OUT.dtype.element_ty).to(tl.float32) * w
    tl.store(OUT + row * WIDTH + c, out.to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def group_backward(
    X, W, DOUT, DX, PARTIAL, stride_x, stride_o, num_rows, eps,
    END0: tl.constexpr, START1: tl.constexpr, END1: tl.constexpr, START2: tl.constexpr, END2: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    ok = (row < num_rows) & (c < WIDTH)
    grouped = (c < END0) | ((c >= START1) & (c < END1)) | ((c >= START2) & (c < END2))
    x = tl.where(grouped, tl.load(X + row * stride_x + c, mask=ok, other=0.0).to(tl.float32), 0.0)
    d_out = tl.where(grouped, tl.load(DOUT + row * stride_o + c, mask=ok, other=0.0).to(tl.float32), 0.0)
    w = tl.load(W + c, mask=c < WIDTH, other=0.0).to(DX.dtype.element_ty).to(tl.float32)
    scale = 1.0 / tl.sqrt(_group_mean(x * x, c, END0, START1, END1, START2, END2) + eps)
    normed, d_normed = x * scale, d_out * w
    mean = _group_mean(d_normed * normed, c, END0, START1, END1, START2, END2)
    dx = scale * (d_normed - normed * mean)
    tl.store(DX + row * WIDTH + c, dx.to(DX.dtype.element_ty), mask=ok)
    d_weight = tl.sum(d_out * normed.to(DX.dtype.element_ty).to(tl.float32), 0)
    column = tl.arange(0, BLOCK)
    tl.store(PARTIAL + tl.program_id(0) * WIDTH + column, d_weight, mask=column < WIDTH)
