"""Mean of two RMSNorms on a GPU: one pass forward, one backward; two each where ranks add up in between. Deterministic.

Kept for the backward pass: the two inputs and two float32 a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba_train.ops import float8
from hymba_train.ops.branch_norms import AllReduce
from hymba_train.ops.float8_triton import fp8_scale
from hymba_train.ops.gradient_slots import empty_gradient, slot_of
from hymba_train.ops.rows_triton import as_rows, block_of, share_rows, warps_of

FORWARD_VALUES = 16
"""Columns of a row that a thread holds."""
BACKWARD_VALUES, BACKWARD_STAGES, BACKWARD_PROGRAMS = 8, 3, 1
"""Columns a thread, rows under way (the loads of the next ones go on while a row is added up), and programs a
multiprocessor has room for."""


def normed_average_triton(
    attention: Tensor,
    ssm: Tensor,
    attention_weight: Tensor,
    ssm_weight: Tensor,
    eps: float,
    true_width: int,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """:func:`hymba_train.ops.branch_norms.normed_average`; backend ``triton``."""
    return normed_average_fp8(attention, ssm, attention_weight, ssm_weight, eps, true_width, all_reduce, None)


def normed_average_fp8(
    attention: Tensor, ssm: Tensor, attention_weight: Tensor, ssm_weight: Tensor, eps: float, true_width: int,
    all_reduce: AllReduce | None, result: float8.Quantizer | None,
) -> Tensor:  # fmt: skip
    """The same, as a Float8Tensor by ``result``'s delayed scale: bit for bit what it would make of the mean in bf16."""
    slots = (slot_of(attention), slot_of(ssm))
    return _NormedAverage.apply(
        attention, ssm, attention_weight, ssm_weight, eps, true_width, all_reduce, slots, result
    )


class _NormedAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention, ssm, wa, ws, eps, true_width, all_reduce, slots, result):
        a, s, wa, ws = as_rows(attention), as_rows(ssm), wa.contiguous(), ws.contiguous()
        n, width = a.shape
        ctx.block = block_of(width, "normed_average")
        constants = dict(WIDTH=width, BLOCK=ctx.block, num_warps=warps_of(ctx.block, FORWARD_VALUES))
        out, scaling = float8.memory(attention.shape, a, result)
        sums = torch.empty(n, 2, dtype=torch.float32, device=a.device)
        strides = (a.stride(0), s.stride(0))
        with torch.cuda.device_of(a):
            if all_reduce is not None:
                if n:
                    average_sums[(n,)](a, s, sums, *strides, **constants)
                all_reduce(sums)
            if n:
                average_forward[(n,)](
                    a, s, wa, ws, sums, out, *scaling, *strides, eps, true_width,
                    **constants, GIVEN=all_reduce is not None,
                )  # fmt: skip
        ctx.save_for_backward(a, s, wa, ws, sums)
        ctx.eps, ctx.true_width, ctx.all_reduce, ctx.slots, ctx.shape = (
            eps, true_width, all_reduce, slots, attention.shape
        )  # fmt: skip
        return float8.tensor(out, scaling[2], result, a.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        a, s, wa, ws, sums = ctx.saved_tensors
        (n, width), d_out = a.shape, as_rows(d_out)
        da, ds = empty_gradient(ctx.slots[0], a), empty_gradient(ctx.slots[1], s)
        programs, each = share_rows(n, BACKWARD_PROGRAMS, a.device)
        partial = torch.empty(programs, 2, width, dtype=torch.float32, device=a.device)
        dots = torch.empty_like(sums)
        strides = (a.stride(0), s.stride(0), d_out.stride(0))
        constants = dict(WIDTH=width, BLOCK=ctx.block, num_warps=warps_of(ctx.block, BACKWARD_VALUES))
        with torch.cuda.device_of(a):
            if ctx.all_reduce is not None:
                if n:
                    average_dots[(n,)](a, s, wa, ws, d_out, dots, *strides, **constants)
                ctx.all_reduce(dots)
            if n:
                average_backward[(programs,)](
                    a, s, wa, ws, sums, dots, d_out, da, ds, partial, *strides, da.stride(0), ds.stride(0),
                    n, each, ctx.eps, ctx.true_width,
                    **constants, GIVEN=ctx.all_reduce is not None, STAGES=BACKWARD_STAGES,
                )  # fmt: skip
        d_weights = partial.sum(0)
        gradients = (da.view(ctx.shape), ds.view(ctx.shape), d_weights[0].to(wa.dtype), d_weights[1].to(ws.dtype))
        return *gradients, None, None, None, None, None


@triton.jit
def _row(X, row, stride, c, ok):
    return tl.load(X + row * stride + c, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _weight(W, c, ok, like):
    return tl.load(W + c, mask=ok, other=0.0).to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def average_sums(A, S, SUMS, stride_a, stride_s, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    a, s = _row(A, row, stride_a, c, c < WIDTH), _row(S, row, stride_s, c, c < WIDTH)
    tl.store(SUMS + 2 * row, tl.sum(a * a, 0))
    tl.store(SUMS + 2 * row + 1, tl.sum(s * s, 0))


@triton.jit
def average_forward(
    A, S, WA, WS, SUMS, OUT, SCALE, AMAX, SCALE_INV, stride_a, stride_s, eps, true_width,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """SUMS [N, 2], the sums of squares: read if GIVEN (added up over ranks), else computed and written."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    ok = c < WIDTH
    a, s = _row(A, row, stride_a, c, ok), _row(S, row, stride_s, c, ok)
    wa, ws = _weight(WA, c, ok, A), _weight(WS, c, ok, A)
    if GIVEN:
        sum_a, sum_s = tl.load(SUMS + 2 * row), tl.load(SUMS + 2 * row + 1)
    else:
        sum_a, sum_s = tl.sum(a * a, 0), tl.sum(s * s, 0)
        tl.store(SUMS + 2 * row, sum_a)
        tl.store(SUMS + 2 * row + 1, sum_s)
    a = (a * (1.0 / tl.sqrt(sum_a / true_width + eps))).to(A.dtype.element_ty).to(tl.float32)
    s = (s * (1.0 / tl.sqrt(sum_s / true_width + eps))).to(A.dtype.element_ty).to(tl.float32)
    mean = 0.5 * (a * wa + s * ws)
    if SCALE is not None:
        mean = mean.to(A.dtype.element_ty).to(tl.float32)
        mean *= fp8_scale(tl.abs(mean), SCALE, AMAX, SCALE_INV)
    tl.store(OUT + row * WIDTH + c, mean.to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def average_dots(A, S, WA, WS, DOUT, DOTS, stride_a, stride_s, stride_o, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """DOTS [N, 2] = sum of (dy w / 2) x, whose total over ranks is what the norms' gradients need."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    ok = c < WIDTH
    a, s = _row(A, row, stride_a, c, ok), _row(S, row, stride_s, c, ok)
    half = 0.5 * _row(DOUT, row, stride_o, c, ok)
    tl.store(DOTS + 2 * row, tl.sum(half * _weight(WA, c, ok, A) * a, 0))
    tl.store(DOTS + 2 * row + 1, tl.sum(half * _weight(WS, c, ok, A) * s, 0))


@triton.jit
def average_backward(
    A, S, WA, WS, SUMS, DOTS, DOUT, DA, DS, PARTIAL, stride_a, stride_s, stride_o, stride_da, stride_ds,
    num_rows, each, eps, true_width,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = r (dy w / 2) - x r^3 dot / E, r = 1 / root mean square; a program adds up dy n / 2 over ``each`` rows."""
    first, c = tl.program_id(0).to(tl.int64) * each, tl.arange(0, BLOCK)
    ok = c < WIDTH
    wa, ws = 0.5 * _weight(WA, c, ok, A), 0.5 * _weight(WS, c, ok, A)
    dwa, dws = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for row in tl.range(first, tl.minimum(first + each, num_rows), num_stages=STAGES):
        a, s = _row(A, row, stride_a, c, ok), _row(S, row, stride_s, c, ok)
        d_out = _row(DOUT, row, stride_o, c, ok)
        ra = 1.0 / tl.sqrt(tl.load(SUMS + 2 * row) / true_width + eps)
        rs = 1.0 / tl.sqrt(tl.load(SUMS + 2 * row + 1) / true_width + eps)
        if GIVEN:
            dot_a, dot_s = tl.load(DOTS + 2 * row), tl.load(DOTS + 2 * row + 1)
        else:
            dot_a, dot_s = tl.sum(d_out * wa * a, 0), tl.sum(d_out * ws * s, 0)
        na, ns = a * ra, s * rs
        da = d_out * wa * ra - na * (ra * ra * dot_a / true_width)
        ds = d_out * ws * rs - ns * (rs * rs * dot_s / true_width)
        dwa += d_out * na.to(A.dtype.element_ty).to(tl.float32)
        dws += d_out * ns.to(A.dtype.element_ty).to(tl.float32)
        tl.store(DA + row * stride_da + c, da.to(DA.dtype.element_ty), mask=ok)
        tl.store(DS + row * stride_ds + c, ds.to(DS.dtype.element_ty), mask=ok)
    place = PARTIAL + tl.program_id(0) * (2 * WIDTH) + c
    tl.store(place, 0.5 * dwa, mask=ok)
    tl.store(place + WIDTH, 0.5 * dws, mask=ok)
