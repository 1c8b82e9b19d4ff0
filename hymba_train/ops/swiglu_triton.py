"""SiLU(gate) * up on a GPU: one pass forward, one backward that writes both gradients into one buffer.

Kept for the backward pass: gate_up alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba_train.ops.rows_triton import as_rows

ROWS, COLUMNS, WARPS = 4, 1024, 4
"""Tile of a program."""


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """:func:`hymba_train.ops.swiglu.swiglu`; backend ``triton``."""
    return _Swiglu.apply(gate_up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        rows = as_rows(gate_up)
        ctx.save_for_backward(rows)
        ctx.shape = gate_up.shape
        n, width = rows.shape[0], rows.shape[1] // 2
        out = torch.empty(n, width, dtype=rows.dtype, device=rows.device)
        _launch(swiglu_forward, n, width, rows, out, rows.stride(0))
        return out.view(*gate_up.shape[:-1], width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        (rows,) = ctx.saved_tensors
        d_out, n, width = as_rows(d_out), rows.shape[0], rows.shape[1] // 2
        d_rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        _launch(swiglu_backward, n, width, rows, d_out, d_rows, rows.stride(0), d_out.stride(0))
        return d_rows.view(ctx.shape)


def _launch(kernel, n: int, width: int, rows: Tensor, *args) -> None:
    if n and width:
        with torch.cuda.device_of(rows):
            kernel[(triton.cdiv(n, ROWS), triton.cdiv(width, COLUMNS))](  # the first axis may have more than 65,535
                rows, *args, n, WIDTH=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
            )


@triton.jit
def swiglu_forward(X, OUT, stride_x, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    ok = (c < WIDTH) & (row < num_rows)
    gate = tl.load(X + row * stride_x + c, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(X + row * stride_x + WIDTH + c, mask=ok, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(OUT + row * WIDTH + c, out.to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def swiglu_backward(
    X, DOUT, DX, stride_x, stride_o, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    ok = (c < WIDTH) & (row < num_rows)
    gate = tl.load(X + row * stride_x + c, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(X + row * stride_x + WIDTH + c, mask=ok, other=0.0).to(tl.float32)
    d_out = tl.load(DOUT + row * stride_o + c, mask=ok, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    place = DX + row * (2 * WIDTH) + c
    d_gate = d_out * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(place, d_gate.to(DX.dtype.element_ty), mask=ok)
    tl.store(place + WIDTH, (d_out * silu).to(DX.dtype.element_ty), mask=ok)
