"""RMSNorm on a GPU, alone and after a residual add: one pass forward, one backward. Deterministic.

Kept for the backward pass: the input of the norm and one float32 a row (1 / root mean square).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba_train.ops.gradient_slots import GradientSlot, empty_gradient, slot_of
from hymba_train.ops.rows_triton import as_rows, block_of, share_rows, warps_of

BACKWARD_VALUES, BACKWARD_STAGES, BACKWARD_PROGRAMS = 16, 3, 5
"""Columns a thread, rows under way, and programs a multiprocessor has room for."""


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`hymba_train.ops.rms_norm.rms_norm`; backend ``triton``."""
    return _Norm.apply(x, weight, eps, slot_of(x))


def add_rms_norm_triton(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`hymba_train.ops.rms_norm.add_rms_norm`; backend ``triton``. Both inputs have one dtype and shape,
    else ValueError."""
    if residual.dtype != x.dtype or residual.shape != x.shape:
        raise ValueError(f"add_rms_norm of {residual.dtype} {list(residual.shape)} and {x.dtype} {list(x.shape)}")
    return _AddNorm.apply(residual, x, weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, slot):
        rows = as_rows(x)
        out, scale = _normalise(rows, rows, None, weight, eps)
        ctx.save_for_backward(rows, weight, scale)
        ctx.shape, ctx.slot = x.shape, slot
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        rows, weight, scale = ctx.saved_tensors
        dx, d_weight = _gradients(rows, weight, scale, None, d_out, ctx.slot)
        return dx.view(ctx.shape), d_weight, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, x, weight, eps):
        ctx.set_materialize_grads(False)
        rows = as_rows(x)
        total = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        out, scale = _normalise(as_rows(residual), rows, total, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return total.view(x.shape), out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total, d_out):
        if d_out is None:
            return d_total, d_total, None, None
        total, weight, scale = ctx.saved_tensors
        dx, d_weight = _gradients(total, weight, scale, d_total, d_out, None)
        dx = dx.view(d_out.shape)
        return dx, dx, d_weight, None


def _normalise(
    residual: Tensor, rows: Tensor, total: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norm [N, D] and scale [N]; with ``total``, residual + rows goes there and is what is normalised."""
    n, width = rows.shape
    out = torch.empty(n, width, dtype=rows.dtype, device=rows.device)
    scale = torch.empty(n, dtype=torch.float32, device=rows.device)
    block = block_of(width, "rms_norm")
    if n:
        with torch.cuda.device_of(rows):
            norm_forward[(n,)](
                residual, rows, weight.contiguous(), out if total is None else total, out, scale,
                residual.stride(0), rows.stride(0), eps,
                WIDTH=width, BLOCK=block, ADD=total is not None, num_warps=warps_of(block),
            )  # fmt: skip
    return out, scale


def _gradients(
    rows: Tensor, weight: Tensor, scale: Tensor, d_total: Tensor | None, d_out: Tensor, slot: GradientSlot | None
) -> tuple[Tensor, Tensor]:
    """Gradient [N, D] of the norm's input, d_total included, and of the weight."""
    n, width = rows.shape
    d_out = as_rows(d_out)
    other = d_out if d_total is None else as_rows(d_total)
    programs, each = share_rows(n, BACKWARD_PROGRAMS, rows.device)
    dx, partial = empty_gradient(slot, rows), torch.empty(programs, width, dtype=torch.float32, device=rows.device)
    block = block_of(width, "rms_norm")
    if n:
        with torch.cuda.device_of(rows):
            norm_backward[(programs,)](
                rows, weight.contiguous(), scale, other, d_out, dx, partial,
                rows.stride(0), other.stride(0), d_out.stride(0), dx.stride(0), n, each,
                WIDTH=width, BLOCK=block, ADD=d_total is not None, STAGES=BACKWARD_STAGES,
                num_warps=warps_of(block, BACKWARD_VALUES),
            )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


@triton.jit
def norm_forward(
    RESIDUAL, X, W, TOTAL, OUT, SCALE, stride_r, stride_x, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < WIDTH
    x = tl.load(X + row * stride_x + c, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(W + c, mask=ok, other=0.0).to(OUT.dtype.element_ty).to(tl.float32)
    if ADD:
        x += tl.load(RESIDUAL + row * stride_r + c, mask=ok, other=0.0).to(tl.float32)
        low = x.to(OUT.dtype.element_ty)
        tl.store(TOTAL + row * WIDTH + c, low, mask=ok)
        x = low.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    normed = (x * scale).to(OUT.dtype.element_ty).to(tl.float32)
    tl.store(OUT + row * WIDTH + c, (normed * w).to(OUT.dtype.element_ty), mask=ok)
    tl.store(SCALE + row, scale)


@triton.jit
def norm_backward(
    X, W, SCALE, DTOTAL, DOUT, DX, PARTIAL, stride_x, stride_t, stride_o, stride_d, num_rows, each,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = scale (w dy - n mean(w dy n)) with n = scale x; a program adds up dy n over ``each`` rows."""
    first = tl.program_id(0).to(tl.int64) * each
    c = tl.arange(0, BLOCK)
    ok = c < WIDTH
    w = tl.load(W + c, mask=ok, other=0.0).to(X.dtype.element_ty).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(first, tl.minimum(first + each, num_rows), num_stages=STAGES):
        scale = tl.load(SCALE + row)
        x = tl.load(X + row * stride_x + c, mask=ok, other=0.0).to(tl.float32)
        d_out = tl.load(DOUT + row * stride_o + c, mask=ok, other=0.0).to(tl.float32)
        normed = x * scale
        d_normed = d_out * w
        dx = scale * (d_normed - normed * (tl.sum(d_normed * normed, 0) / WIDTH))
        if ADD:
            dx += tl.load(DTOTAL + row * stride_t + c, mask=ok, other=0.0).to(tl.float32)
        d_weight += d_out * normed.to(X.dtype.element_ty).to(tl.float32)
        tl.store(DX + row * stride_d + c, dx.to(DX.dtype.element_ty), mask=ok)
    tl.store(PARTIAL + tl.program_id(0) * WIDTH + c, d_weight, mask=ok)
