"""SiLU(gate) * up on a GPU: one pass forward, one backward that writes both gradients into one buffer. Either can write
FP8 at once, which saves the pass of a cast.

Kept for the backward pass: gate_up alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba_train.ops import float8
from hymba_train.ops.float8_triton import fp8_scale
from hymba_train.ops.rows_triton import as_rows

ROWS, COLUMNS, WARPS = 4, 1024, 4
"""Tile of a program."""


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """:func:`hymba_train.ops.swiglu.swiglu`; backend ``triton``."""
    return _Swiglu.apply(gate_up, None, None)


def swiglu_triton_fp8(gate_up: Tensor, result: float8.Quantizer, gradient: float8.Quantizer) -> Tensor:
    """The same, in Transformer Engine's FP8: the result and gate_up's gradient are Float8Tensors, by the delayed scales
    of these two quantizers, which note the largest values. Bit for bit what they would make of results in bf16.

    The result goes to a product that reads FP8, and gate_up comes straight from one that takes such a gradient.
    """
    return _Swiglu.apply(gate_up, result, gradient)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, result, gradient):
        rows = as_rows(gate_up)
        ctx.save_for_backward(rows)
        ctx.shape, ctx.gradient = gate_up.shape, gradient
        shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        return _launch(swiglu_forward, result, shape, rows, rows.stride(0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        (rows,) = ctx.saved_tensors
        d_out = as_rows(d_out)
        d_rows = _launch(swiglu_backward, ctx.gradient, ctx.shape, rows, d_out, rows.stride(0), d_out.stride(0))
        return d_rows, None, None


def _launch(kernel, quantizer: float8.Quantizer | None, shape: tuple[int, ...], rows: Tensor, *args) -> Tensor:
    """What a kernel makes of ``rows`` [N, 2F], in this shape: in their type, or in FP8 where there is a quantizer."""
    n, width = rows.shape[0], rows.shape[1] // 2
    out, scaling = float8.memory(shape, rows, quantizer)
    if n and width:
        with torch.cuda.device_of(rows):
            kernel[(triton.cdiv(n, ROWS), triton.cdiv(width, COLUMNS))](  # the first axis may have more than 65,535
                rows, *args, out, *scaling, n, WIDTH=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
            )
    return float8.tensor(out, scaling[2], quantizer, rows.dtype)


@triton.jit
def swiglu_forward(
    X, stride_x, OUT, SCALE, AMAX, SCALE_INV, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    ok = (c < WIDTH) & (row < num_rows)
    gate = tl.load(X + row * stride_x + c, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(X + row * stride_x + WIDTH + c, mask=ok, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    if SCALE is not None:
        out = out.to(X.dtype.element_ty).to(tl.float32)
        out *= fp8_scale(tl.abs(out), SCALE, AMAX, SCALE_INV)
    tl.store(OUT + row * WIDTH + c, out.to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def swiglu_backward(
    X, DOUT, stride_x, stride_o, DX, SCALE, AMAX, SCALE_INV, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    ok = (c < WIDTH) & (row < num_rows)
    gate = tl.load(X + row * stride_x + c, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(X + row * stride_x + WIDTH + c, mask=ok, other=0.0).to(tl.float32)
    d_out = tl.load(DOUT + row * stride_o + c, mask=ok, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = d_out * up * (sigmoid + silu * (1.0 - sigmoid))
    d_up = d_out * silu
    if SCALE is not None:
        d_gate = d_gate.to(X.dtype.element_ty).to(tl.float32)
        d_up = d_up.to(X.dtype.element_ty).to(tl.float32)
        scale = fp8_scale(tl.maximum(tl.abs(d_gate), tl.abs(d_up)), SCALE, AMAX, SCALE_INV)
        d_gate *= scale
        d_up *= scale
    place = DX + row * (2 * WIDTH) + c
    tl.store(place, d_gate.to(DX.dtype.element_ty), mask=ok)
    tl.store(place + WIDTH, d_up.to(DX.dtype.element_ty), mask=ok)
