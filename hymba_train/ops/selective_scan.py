"""Mamba-1 selective scan (hymba-architecture 2.8): signature, plain reference, and the chunked plain-torch backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.ops.segments import document_starts

CHUNK_TOKENS: int | None = None
"""Steps between saved states. None: as many as keep the work buffers in a CPU's cache, 8 to 64; 64 on a GPU."""


def selective_scan(
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
    """Scan with skip and gate; backend ``torch`` (any device; fast on a CPU). In letters, C channels, N states::

        delta = softplus(dt + dt_bias);  A = -exp(A_log)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t;  y_t = (C_t . h_t + D u_t) silu(z_t)

    Args:
        u: [B, S, C] input after convolution; dt, z: [B, S, C]; B, C: [B, S, N]; any floating dtype.
        A_log: [C, N]; D, dt_bias: [C].
        initial_state: h before the first token, [C, N] or [B, C, N]; None: zeros.
        segment_ids: int64 [B, S], one number per document; every document starts from initial_state.

    Returns:
        y [B, S, C] in u.dtype; final_state [B, C, N], that after the last token, float32.

    Everything inside is float32 (float64 if u is). Gradients go to every floating argument, through both results.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    u_wide, A = u.to(wide), -torch.exp(A_log.to(wide))
    delta = F.softplus(dt.to(wide) + dt_bias.to(wide))
    state = _initial_state(u_wide, A, initial_state)
    starts = _later_starts(segment_ids)
    y, state = _ChunkedScan.apply(
        delta, delta * u_wide, A.t().contiguous(), B.to(wide), C.to(wide), state.transpose(1, 2).contiguous(), starts
    )
    y = torch.addcmul(y, D.to(wide), u_wide) * F.silu(z.to(wide))
    return y.to(u.dtype), state.transpose(1, 2)


def selective_scan_reference(
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
    """:func:`selective_scan` as it is written down, a step at a time through autograd; backend ``reference``."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u_wide, A = u.to(wide), -torch.exp(A_log.to(wide))
    delta = F.softplus(dt.to(wide) + dt_bias.to(wide))
    first = h = _initial_state(u_wide, A, initial_state)
    starts = None if segment_ids is None else document_starts(segment_ids)
    y = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], first, h)
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * u_wide[:, t])[:, :, None] * B[:, t, None, :].to(wide)
        y.append((h * C[:, t, None, :].to(wide)).sum(-1) + D.to(wide) * u_wide[:, t])
    total = torch.stack(y, dim=1) if y else torch.zeros_like(u_wide)
    return (total * F.silu(z.to(wide))).to(u.dtype), h


def _initial_state(u: Tensor, A: Tensor, initial_state: Tensor | None) -> Tensor:
    """[B, C, N] in u.dtype, one a row."""
    if initial_state is None:
        return u.new_zeros(u.shape[0], *A.shape)
    return initial_state.to(u.dtype).expand(u.shape[0], *A.shape)


def _later_starts(segment_ids: Tensor | None) -> list[tuple[int, int]]:
    """(token, row) of every document start but those of token 0, by rising token. Waits for a GPU."""
    if segment_ids is None:
        return []
    token_row = document_starts(segment_ids)[:, 1:].t().nonzero().tolist()
    return [(token + 1, row) for token, row in token_row]


class _Chunk:
    """Decay a and input b of some steps, time first: [T, B, N, C], so that a step is one contiguous block.

    Where a document starts, h_{t-1} is replaced by the initial state h0: b += a h0, then a = 0; ``a_start`` keeps the
    true a there. a and b live in the work buffers given, that every chunk reuses: allocating them anew costs several
    times the arithmetic.
    """

    def __init__(self, first: int, last: int, delta: Tensor, du: Tensor, A: Tensor, B: Tensor, a: Tensor, b: Tensor):
        self.span = slice(first, last)
        self.delta, self.du = _time_first(delta, self.span), _time_first(du, self.span)
        self.B = _time_first(B, self.span)
        self.a = torch.mul(self.delta, A, out=a[: last - first]).exp_()
        self.b = torch.mul(self.du, self.B.transpose(2, 3), out=b[: last - first])
        self.index: tuple[Tensor, Tensor] | None = None

    def reset(self, starts: list[tuple[int, int]], initial: Tensor) -> None:
        here = [(t - self.span.start, row) for t, row in starts if self.span.start <= t < self.span.stop]
        if here:
            self.index = tuple(torch.tensor(here, device=initial.device).t())
            self.a_start = self.a[self.index]
            self.b[self.index] += self.a_start * initial[self.index[1]]
            self.a[self.index] = 0.0

    def states(self, before: Tensor) -> Tensor:
        """h of every step [T, B, N, C], in place of b; ``before``: h before the first."""
        h = before
        for a_t, b_t in zip(self.a.unbind(), self.b.unbind(), strict=True):
            h = b_t.addcmul_(a_t, h)
        return self.b


def _chunk_tokens(delta: Tensor, A: Tensor) -> int:
    if CHUNK_TOKENS or delta.device.type != "cpu":
        return CHUNK_TOKENS or 64
    step_elements = max(1, delta.shape[0] * A.numel())
    return min(max(2**20 // step_elements, 8), 64)


def _time_first(x: Tensor, span: slice) -> Tensor:
    """[B, S, C] -> the steps of span as [T, B, 1, C] (a view)."""
    return x[:, span].transpose(0, 1).unsqueeze(2)


def _work_buffers(count: int, size: int, delta: Tensor, A: Tensor) -> list[Tensor]:
    batch, num_tokens, channels = delta.shape
    return list(delta.new_empty(count, min(size, num_tokens), batch, A.shape[0], channels).unbind())


class _ChunkedScan(torch.autograd.Function):
    """The recurrence alone. Saves the state before each chunk and recomputes the rest.

    delta, du = delta * u: [B, S, C]; A [N, C]; B, C [B, S, N]; initial [B, N, C] -> C.h [B, S, C], final [B, N, C].
    All states lie with channels last ([B, N, C]): N is far too short an innermost axis for vector instructions.
    """

    @staticmethod
    def forward(ctx, delta, du, A, B, C, initial, starts):
        num_tokens = delta.shape[1]
        y = torch.empty_like(delta)
        size = _chunk_tokens(delta, A)
        a, b = _work_buffers(2, size, delta, A)
        state, borders = initial, []
        for first in range(0, num_tokens, size):
            last = min(first + size, num_tokens)
            borders.append(state)
            chunk = _Chunk(first, last, delta, du, A, B, a, b)
            chunk.reset(starts, initial)
            h = chunk.states(state)
            y[:, first:last] = (_time_first(C, chunk.span) @ h).squeeze(2).transpose(0, 1)
            state = h[-1].clone()
        ctx.save_for_backward(delta, du, A, B, C, initial, *borders)
        ctx.starts, ctx.size = starts, size
        return y, (state.clone() if state is initial else state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstate):
        delta, du, A, B, C, initial, *borders = ctx.saved_tensors
        d_delta, d_du, dB, dC = (torch.empty_like(x) for x in (delta, du, B, C))
        dA, d_initial = torch.zeros_like(A), torch.zeros_like(initial)
        a, b, g_buffer, work_buffer = _work_buffers(4, ctx.size, delta, A)
        carry = dstate  # gradient to the state after the chunk at hand, through later steps and the final state
        for k in reversed(range(len(borders))):
            first, last = k * ctx.size, min((k + 1) * ctx.size, delta.shape[1])
            chunk = _Chunk(first, last, delta, du, A, B, a, b)
            chunk.reset(ctx.starts, initial)
            h = chunk.states(borders[k])
            dy_t = _time_first(dy, chunk.span)
            g, work = g_buffer[: last - first], work_buffer[: last - first]
            torch.mul(dy_t, _time_first(C, chunk.span).transpose(2, 3), out=g)  # becomes the gradient to every h_t
            a_steps, g_steps = chunk.a.unbind(), g.unbind()
            g_steps[-1].add_(carry)
            for t in range(last - first - 2, -1, -1):
                g_steps[t].addcmul_(a_steps[t + 1], g_steps[t + 1])
            carry = a_steps[0] * g_steps[0]
            dC[:, chunk.span] = torch.mul(h, dy_t, out=work).sum(-1).transpose(0, 1)
            dB[:, chunk.span] = torch.mul(g, chunk.du, out=work).sum(-1).transpose(0, 1)
            d_du[:, chunk.span] = (chunk.B @ g).squeeze(2).transpose(0, 1)
            q = chunk.a.mul_(g)  # becomes g_t a_t h_{t-1}: the gradient to delta_t A
            q[1:].mul_(h[:-1])
            q[0].mul_(borders[k])
            if chunk.index is not None:
                to_start = g[chunk.index] * chunk.a_start
                d_initial.index_add_(0, chunk.index[1], to_start)
                q[chunk.index] = to_start * initial[chunk.index[1]]
            d_delta[:, chunk.span] = torch.mul(q, A, out=work).sum(2).transpose(0, 1)
            dA += torch.mul(q, chunk.delta, out=work).sum((0, 1))
        return d_delta, d_du, dA, dB, dC, d_initial + carry, None
