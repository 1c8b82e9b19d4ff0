"""Selective scan on a GPU: Triton kernels, chunked in time, channels last. Deterministic; float32 inside.

Forward: (1) each chunk's end state from a zero start, (2) a pass over the chunks that turns them into each chunk's true
start state, (3) the outputs. Backward mirrors that for the gradient to the states. Only the chunks' start states are
kept; the backward recomputes the others. The kernels are in :mod:`hymba_train.ops.selective_scan_kernels`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hymba_train.errors import UserError
from hymba_train.ops.segments import document_starts
from hymba_train.ops.selective_scan_kernels import scan_backward, scan_carry, scan_output, scan_pass, scan_state

CHUNK_TOKENS = 64
"""Steps of a chunk: one program a chunk, 32 channels and row."""
SEGMENT_TOKENS = 4
"""Steps unrolled, whose states the backward holds in registers."""
CHANNELS = 32
"""Channels a program: one a lane of its single warp, all N states of a channel in that lane's registers."""


def selective_scan_triton(
    u: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`hymba_train.ops.selective_scan.selective_scan`; backend ``triton``.

    Raises UserError if the number of states N is not a power of two.
    """
    (batch, _, channels), num_states = u.shape, A_log.shape[1]
    if num_states & (num_states - 1):
        raise UserError(
            f"selective_scan: backend 'triton' needs a power of two as mamba_state_dim, not {num_states}; use 'torch'"
        )
    a2 = (-torch.exp(A_log.float()) / math.log(2)).t().contiguous()  # exp(delta A) = exp2(delta a2)
    if initial_state is None:
        state = u.new_zeros(batch, num_states, channels, dtype=torch.float32)
    else:
        state = initial_state.float().expand(batch, channels, num_states).transpose(1, 2).contiguous()
    if u.numel() == 0:
        return torch.zeros_like(u), state.transpose(1, 2)
    starts = None
    if segment_ids is not None:
        starts = document_starts(segment_ids).int()
        starts[:, 0] = 0  # the first token starts from the initial state anyway
    y, final = _TritonScan.apply(
        u, dt, a2, B.float(), C.float(), D.float(), dt_bias.float(), z, state, starts, torch.is_grad_enabled()
    )
    return y, final.transpose(1, 2)


class _TritonScan(torch.autograd.Function):
    """u, dt, z [B, S, C]; a2 [N, C], B, C [B, S, N], D, bias [C], state [B, N, C] float32; starts int32 [B, S]."""

    @staticmethod
    def forward(ctx, u, dt, a2, B, C, D, bias, z, state, starts, with_grad):
        u, dt, B, C, D, bias, z = (x.contiguous() for x in (u, dt, B, C, D, bias, z))
        launch = _Launch(u, a2, starts)
        y, final = torch.empty_like(u), torch.empty_like(state)
        h, sum_delta = launch.buffer(a2.shape[0]), launch.buffer()
        launch(scan_state, u, dt, B, a2, bias, state, launch.starts, h, sum_delta)
        launch.pass_(h, sum_delta, a2, state, final, reverse=False)
        launch(scan_output, u, dt, z, B, C, a2, bias, D, state, launch.starts, h, y)
        if with_grad and any(ctx.needs_input_grad):
            ctx.save_for_backward(u, dt, a2, B, C, D, bias, z, state, h, sum_delta)
            ctx.launch = launch
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        u, dt, a2, B, C, D, bias, z, state, h, sum_delta = ctx.saved_tensors
        launch = ctx.launch
        (batch, num_tokens, _), num_states = u.shape, a2.shape[0]
        dy = dy.contiguous()
        g, d_state = launch.buffer(num_states), torch.empty_like(state)
        launch(scan_carry, dt, z, dy, C, a2, bias, launch.starts, g)
        launch.pass_(g, sum_delta, a2, dfinal.contiguous(), d_state, reverse=True)
        du, ddt, dz = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(z)
        # Sums over channels and over chunks go through partial buffers: no atomics, the same bits every time.
        dB, dC = (u.new_empty(launch.grid[0], batch, num_tokens, num_states, dtype=torch.float32) for _ in range(2))
        dA, d_reset = launch.buffer(num_states), launch.buffer(num_states) if launch.has_starts else state
        dD, d_bias = launch.buffer(), launch.buffer()
        states = launch.buffer(CHUNK_TOKENS // SEGMENT_TOKENS, num_states)
        launch(
            scan_backward, u, dt, z, dy, B, C, a2, bias, D, state, launch.starts, h, g, states,
            du, ddt, dz, dB, dC, dA, d_reset, dD, d_bias,
        )  # fmt: skip
        if launch.has_starts:
            d_state = d_state + d_reset.sum(1)
        da2 = dA.sum((0, 1)) * math.log(2)
        return du, ddt, da2, dB.sum(0), dC.sum(0), dD.sum((0, 1)), d_bias.sum((0, 1)), dz, d_state, None, None


class _Launch:
    """Sizes and grid that all kernels of one scan share."""

    def __init__(self, u: Tensor, a2: Tensor, starts: Tensor | None) -> None:
        batch, self.num_tokens, self.channels = u.shape
        self.num_states, self.device = a2.shape[0], u.device
        self.num_chunks = -(-self.num_tokens // CHUNK_TOKENS)
        self.grid = (-(-self.channels // CHANNELS), self.num_chunks, batch)
        self.has_starts = starts is not None
        self.starts = a2 if starts is None else starts  # any pointer, not read
        if starts is not None:
            padded = torch.nn.functional.pad(starts, (0, self.num_chunks * CHUNK_TOKENS - self.num_tokens))
            self.keep = (padded.view(batch, self.num_chunks, CHUNK_TOKENS).sum(-1) == 0).int()
        else:
            self.keep = torch.ones(batch, self.num_chunks, dtype=torch.int32, device=u.device)

    def buffer(self, *sizes: int) -> Tensor:
        """float32 [B, chunks, *sizes, C]."""
        shape = (self.grid[2], self.num_chunks, *sizes, self.channels)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def __call__(self, kernel: Any, *tensors: Tensor) -> None:
        with torch.cuda.device_of(tensors[0]):
            kernel[self.grid](
                *tensors, self.num_tokens, self.channels, self.num_chunks, CHUNK=CHUNK_TOKENS, N=self.num_states,
                BC=CHANNELS, U=SEGMENT_TOKENS, STARTS=self.has_starts, num_warps=1, num_stages=1,
            )  # fmt: skip

    def pass_(self, h: Tensor, sum_delta: Tensor, a2: Tensor, first: Tensor, last: Tensor, *, reverse: bool) -> None:
        with torch.cuda.device_of(h):
            scan_pass[self.grid[0], self.grid[2]](
                h, sum_delta, self.keep, a2, first, last, self.channels, self.num_chunks,
                REVERSE=reverse, N=self.num_states, BC=CHANNELS, num_warps=1, num_stages=1,
            )  # fmt: skip
