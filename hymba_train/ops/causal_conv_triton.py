"""Causal convolution on a GPU: Triton, channels last, width 4. Deterministic; sums in float32.

One pass forward, one backward, which computes the pre-activation again: kept are the inputs alone. x may be a slice of
wider rows. The kernels are in :mod:`hymba_train.ops.causal_conv_kernels`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hymba_train.errors import UserError
from hymba_train.ops.causal_conv import final_taps_of_tail
from hymba_train.ops.causal_conv_kernels import conv_backward, conv_forward
from hymba_train.ops.gradient_slots import slot_of

WIDTH = 4
FORWARD_CHUNK, FORWARD_CHANNELS = 64, 128
"""Tokens and channels of a program, which is one warp."""
BACKWARD_CHUNK, BACKWARD_CHANNELS = 64, 64
"""Likewise. Half the channels: two warps fit where one with 250 registers would."""


def causal_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    initial_taps: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`hymba_train.ops.causal_conv.causal_conv`; backend ``triton``. Raises UserError unless the width is 4."""
    _check_width(weight)
    return _Conv.apply(x, weight, bias, initial_taps, segment_ids)


def causal_conv_rows_triton(
    x: Tensor, weight: Tensor, bias: Tensor, *, num_meta: int, batch: int, seq: int, segment_ids: Tensor | None = None
) -> Tensor:
    """:func:`hymba_train.ops.causal_conv.causal_conv_rows`; backend ``triton``. Raises UserError unless the width is 4.

    Meta tokens and text are read from, and written into, one tensor each: no parts are put together.
    """
    _check_width(weight)
    return _ConvRows.apply(x, weight, bias, num_meta, batch, seq, segment_ids, slot_of(x))


def _check_width(weight: Tensor) -> None:
    if weight.shape[1] != WIDTH:
        raise UserError(
            f"causal_conv: backend 'triton' needs mamba_conv_width={WIDTH}, not {weight.shape[1]}; use 'torch'"
        )


class _Conv(torch.autograd.Function):
    """x [B, S, C]; taps [3, C] or [B, 3, C] or None."""

    @staticmethod
    def forward(ctx, x, weight, bias, taps, segment_ids):
        ctx.set_materialize_grads(False)
        ctx.taps_like = taps
        x, weight, bias = _channels_last(x), weight.contiguous(), bias.contiguous()
        taps = _per_row(taps, x)
        ids = None if segment_ids is None else segment_ids.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _run_forward(x, weight, bias, taps, ids, out)
        final = final_taps_of_tail(x, taps, ids)
        ctx.save_for_backward(x, weight, bias, taps, ids)
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_final):
        x, weight, bias, taps, ids = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if d_out is None:
            d_out = torch.zeros_like(dx)
        partial = _partial(x, num_chunks(x) * x.shape[0])
        d_taps = _run_backward(x, weight, bias, taps, ids, _channels_last(d_out), dx, partial)
        if d_final is not None:
            tail = slice(max(0, x.shape[1] - WIDTH + 1), None)
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (x[:, tail], taps.expand(x.shape[0], -1, -1))]
                final = final_taps_of_tail(leaves[0], leaves[1], ids)
            from_final = torch.autograd.grad(final, leaves, d_final, allow_unused=True, materialize_grads=True)
            dx[:, tail] += from_final[0]
            d_taps = d_taps + from_final[1].float()
        d_weight, d_bias = _weight_gradients(partial, weight, bias)
        like = ctx.taps_like
        if like is None:
            d_taps = None
        else:
            d_taps = (d_taps.sum(0) if like.dim() == 2 else d_taps.sum_to_size(like.shape)).to(like.dtype)
        return dx, d_weight, d_bias, d_taps, None


class _ConvRows(torch.autograd.Function):
    """x [N, C]: meta rows, then the rows of text. The meta rows' last three are the text's taps."""

    @staticmethod
    def forward(ctx, x, weight, bias, num_meta, batch, seq, segment_ids, slot):
        x = x if x.stride(-1) == 1 else x.contiguous()
        weight, bias = weight.contiguous(), bias.contiguous()
        ids = None if segment_ids is None else segment_ids.contiguous()
        ctx.sizes, ctx.slot = (num_meta, batch, seq), slot
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        zeros = x.new_zeros(1, WIDTH - 1, x.shape[1])
        meta, text, taps = _parts(x, ctx.sizes, zeros)
        meta_out, text_out = _cut(out, ctx.sizes)
        _run_forward(meta, weight, bias, zeros, None, meta_out)
        _run_forward(text, weight, bias, taps, ids, text_out)
        out[num_meta + batch * seq :].zero_()
        ctx.save_for_backward(x, weight, bias, zeros, ids)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        x, weight, bias, zeros, ids = ctx.saved_tensors
        num_meta, batch, seq = ctx.sizes
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if ctx.slot is None else ctx.slot.take()
        (meta, text, taps), (d_meta_out, d_text_out) = _parts(x, ctx.sizes, zeros), _cut(d_out, ctx.sizes)
        d_meta, d_text = _cut(dx, ctx.sizes)
        lines = num_chunks(text) * batch
        partial = _partial(x, lines + num_chunks(meta))
        d_taps = _run_backward(text, weight, bias, taps, ids, d_text_out, d_text, partial[:lines])
        _run_backward(meta, weight, bias, zeros, None, d_meta_out, d_meta, partial[lines:])
        seen = min(num_meta, WIDTH - 1)
        if seen:
            d_meta[0, num_meta - seen :] += d_taps.sum(0)[WIDTH - 1 - seen :].to(dx.dtype)
        dx[num_meta + batch * seq :].zero_()
        return dx, *_weight_gradients(partial, weight, bias), None, None, None, None, None


def _cut(rows: Tensor, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """[N, C] -> meta [1, M, C], text [B, S, C] (views)."""
    num_meta, batch, seq = sizes
    return rows[:num_meta].unsqueeze(0), rows[num_meta : num_meta + batch * seq].unflatten(0, (batch, seq))


def _parts(x: Tensor, sizes: tuple[int, int, int], zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Meta, text and the text's taps [1, 3, C]: the last three meta rows, zeros where there are fewer."""
    meta, text = _cut(x, sizes)
    seen = min(sizes[0], WIDTH - 1)
    return meta, text, torch.cat((zeros[:, seen:], meta[:, sizes[0] - seen :]), dim=1)


def num_chunks(x: Tensor) -> int:
    """Of the backward pass, each of which has a line in the partial sums."""
    return triton.cdiv(x.shape[1], BACKWARD_CHUNK)


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_row(taps: Tensor | None, x: Tensor) -> Tensor:
    """[1 | B, 3, C] in x.dtype."""
    if taps is None:
        return x.new_zeros(1, WIDTH - 1, x.shape[2])
    return taps.to(x.dtype).reshape(-1, WIDTH - 1, x.shape[2]).contiguous()


def _partial(x: Tensor, lines: int) -> Tensor:
    return torch.empty(lines, WIDTH + 1, x.shape[-1], dtype=torch.float32, device=x.device)


def _weight_gradients(partial: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = partial.sum(0)
    return total[:WIDTH].t().to(weight.dtype), total[WIDTH].to(bias.dtype)


def _taps_stride(taps: Tensor) -> int:
    return taps.stride(0) if taps.shape[0] > 1 else 0


def _run_forward(x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor, ids: Tensor | None, out: Tensor) -> None:
    if x.numel():
        with torch.cuda.device_of(x):
            conv_forward[triton.cdiv(x.shape[2], FORWARD_CHANNELS), triton.cdiv(x.shape[1], FORWARD_CHUNK), x.shape[0]](
                x, weight, bias, taps, weight if ids is None else ids, out, x.shape[1], x.shape[2],
                x.stride(0), x.stride(1), _taps_stride(taps), out.stride(0), out.stride(1),
                CHUNK=FORWARD_CHUNK, BC=FORWARD_CHANNELS, SEGMENTS=ids is not None, num_warps=1,
            )  # fmt: skip


def _run_backward(
    x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor, ids: Tensor | None, d_out: Tensor, dx: Tensor,
    partial: Tensor,
) -> Tensor:  # fmt: skip
    """Fills dx and partial; returns the taps' gradient [B, 3, C], float32."""
    batch, _, channels = x.shape
    lines = 1 if ids is None else num_chunks(x)
    d_taps = torch.empty(batch, lines, WIDTH - 1, channels, dtype=torch.float32, device=x.device)
    if not x.numel():
        return d_taps.new_zeros(batch, WIDTH - 1, channels)
    with torch.cuda.device_of(x):
        conv_backward[triton.cdiv(channels, BACKWARD_CHANNELS), num_chunks(x), batch](
            x, weight, bias, taps, weight if ids is None else ids, d_out, dx, partial, d_taps, x.shape[1], channels,
            x.stride(0), x.stride(1), _taps_stride(taps), d_out.stride(0), d_out.stride(1), dx.stride(0), dx.stride(1),
            CHUNK=BACKWARD_CHUNK, BC=BACKWARD_CHANNELS, SEGMENTS=ids is not None, num_warps=1,
        )  # fmt: skip
    return d_taps[:, 0] if lines == 1 else d_taps.sum(1)
