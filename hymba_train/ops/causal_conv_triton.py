"""Causal convolution on a GPU: Triton, channels last, width 4. Deterministic; sums in float32.

One pass forward, one backward, which computes the pre-activation again: kept are the inputs alone. x may be a slice of
wider rows. The kernels are in :mod:`hymba_train.ops.causal_conv_kernels`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hymba_train.errors import UserError
from hymba_train.ops.causal_conv_kernels import conv_backward, conv_finish, conv_forward
from hymba_train.ops.gradient_slots import empty_gradient, slot_of
from hymba_train.ops.segments import rows_reach

WIDTH = 4
FORWARD_CHUNK, FORWARD_CHANNELS, FORWARD_WARPS, FORWARD_REGISTERS = 64, 128, 1, 128
"""Rows (a multiple of 4), channels and warps of a program, and the most registers of a thread.

Four bf16 channels a thread load 8 bytes, 256 a warp; eight would need more registers than there are.
"""
BACKWARD_CHUNK, BACKWARD_CHANNELS, BACKWARD_WARPS, BACKWARD_REGISTERS = 64, 128, 1, 200
FINISH_LINES, FINISH_CHANNELS = 32, 32
"""Chunks that a step of the last sum reads, and channels of a program."""


def causal_conv_rows_triton(
    x: Tensor, weight: Tensor, bias: Tensor, *, num_meta: int, batch: int, seq: int,
    segment_ids: Tensor | None = None, reach: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`hymba_train.ops.causal_conv.causal_conv_rows`; backend ``triton``. Raises UserError unless the width is 4.

    Meta tokens and text are read from, and written into, one tensor each: no parts are put together.
    """
    if weight.shape[1] != WIDTH:
        raise UserError(
            f"causal_conv: backend 'triton' needs mamba_conv_width={WIDTH}, not {weight.shape[1]}; use 'torch'"
        )
    if reach is None:
        reach = rows_reach(num_meta, batch, seq, x.shape[0], segment_ids, WIDTH - 1, x.device)
    return _ConvRows.apply(x, weight, bias, num_meta, reach, slot_of(x))


class _ConvRows(torch.autograd.Function):
    """x [N, C]; reach int32 [N]."""

    @staticmethod
    def forward(ctx, x, weight, bias, num_meta, reach, slot):
        x = x if x.stride(1) == 1 else x.contiguous()
        weight, bias = weight.contiguous(), bias.contiguous()
        ctx.save_for_backward(x, weight, bias, reach)
        ctx.num_meta, ctx.slot = num_meta, slot
        n, channels = x.shape
        out = torch.empty(n, channels, dtype=x.dtype, device=x.device)
        if out.numel():
            with torch.cuda.device_of(x):
                conv_forward[triton.cdiv(channels, FORWARD_CHANNELS), triton.cdiv(n, FORWARD_CHUNK)](
                    x, weight, bias, reach, out, n, num_meta, channels, x.stride(0), out.stride(0),
                    CHUNK=FORWARD_CHUNK, BC=FORWARD_CHANNELS, num_warps=FORWARD_WARPS, maxnreg=FORWARD_REGISTERS,
                )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        x, weight, bias, reach = ctx.saved_tensors
        d_out = d_out if d_out.stride(1) == 1 else d_out.contiguous()
        n, channels = x.shape
        dx = empty_gradient(ctx.slot, x)
        d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias)
        lines = triton.cdiv(n, BACKWARD_CHUNK)
        if not channels:
            return dx, d_weight, d_bias, None, None, None
        partial = torch.empty(lines, 2 * WIDTH, channels, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            if n:
                conv_backward[triton.cdiv(channels, BACKWARD_CHANNELS), lines](
                    x, weight, bias, reach, d_out, dx, partial, n, ctx.num_meta, channels,
                    x.stride(0), d_out.stride(0), dx.stride(0),
                    CHUNK=BACKWARD_CHUNK, BC=BACKWARD_CHANNELS, num_warps=BACKWARD_WARPS, maxnreg=BACKWARD_REGISTERS,
                )  # fmt: skip
            conv_finish[triton.cdiv(channels, FINISH_CHANNELS), 2 * WIDTH](
                partial, d_weight, d_bias, dx, lines, ctx.num_meta, channels, dx.stride(0),
                LINES=FINISH_LINES, BC=FINISH_CHANNELS, num_warps=4,
            )  # fmt: skip
        return dx, d_weight, d_bias, None, None, None
