"""Scan of Mamba-2 (arXiv 2405.21060): signature, plain reference, and the chunked plain-torch backend.

The recurrence is linear in the state, so what the state before a document adds to its outputs is C_t . h0, decayed from
the document's start to t. Backends compute the scan from zero, where documents only have to be kept apart, and that
part is added to it (:func:`add_initial_state`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_train.ops.recompute import recomputed
from hymba_train.ops.segments import document_starts

CHUNK_TOKENS = 64
"""Tokens whose mutual influence is computed as one matrix product; states are passed from chunk to chunk."""


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan with skip; backend ``torch`` (any device, plain matrix products). For every head, with P channels::

        delta = softplus(dt + dt_bias);  A = -exp(A_log)
        h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T;  y_t = h_t C_t + D x_t

    Args:
        x: [B, S, H, P] input after convolution; dt: [B, S, H]; B, C: [B, S, G, N], head h uses group h * G // H; any
            floating dtype.
        A_log, D, dt_bias: [H].
        initial_state: h before the first token, [H, P, N] or [B, H, P, N]; None: zeros.
        segment_ids: int64 [B, S], one number per document; every document starts from initial_state.

    Returns:
        y [B, S, H, P] in x.dtype; final_state [B, H, P, N], that after the last token, float32.

    Everything inside is float32 (float64 if x is). Gradients go to every floating argument, through both results.
    Only the arguments are kept for the backward pass.
    """

    def scan(x, dt, A_log, B, C, D, dt_bias, initial_state):
        y, state = _scan_from_zero(x, dt, A_log, B, C, D, dt_bias, segment_ids)
        if initial_state is not None:
            added, last = _from_initial_state(x, dt, A_log, C, dt_bias, initial_state, segment_ids)
            y, state = y + added, state + last
        return y.to(x.dtype), state

    y, state = recomputed(scan, x, dt, A_log, B, C, D, dt_bias, initial_state)
    return y, state


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`ssd_scan` as it is written down, a step at a time through autograd; backend ``reference``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    heads, width = x.shape[2:]
    x_wide, A, delta = x.to(wide), -torch.exp(A_log.to(wide)), _delta(dt, dt_bias, wide)
    B, C = (t.to(wide).repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    if initial_state is None:
        initial_state = x_wide.new_zeros(heads, width, B.shape[-1])
    first = h = initial_state.to(wide).expand(x.shape[0], -1, -1, -1)
    starts = None if segment_ids is None else document_starts(segment_ids)
    y = []
    for t in range(x.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None, None], first, h)
        decay = torch.exp(delta[:, t] * A)[:, :, None, None]
        h = decay * h + (delta[:, t, :, None] * x_wide[:, t])[..., None] * B[:, t, :, None, :]
        y.append((h * C[:, t, :, None, :]).sum(-1) + D.to(wide)[:, None] * x_wide[:, t])
    return (torch.stack(y, dim=1) if y else x_wide).to(x.dtype), h


def add_initial_state(
    y: Tensor, state: Tensor, x: Tensor, dt: Tensor, A_log: Tensor, C: Tensor, dt_bias: Tensor, initial_state: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and final state of a scan from zero -> those of one whose documents start from ``initial_state``; shapes
    as in :func:`ssd_scan`."""

    def term(dt, A_log, C, dt_bias, initial_state):
        return _from_initial_state(x, dt, A_log, C, dt_bias, initial_state, segment_ids)

    added, last = recomputed(term, dt, A_log, C, dt_bias, initial_state)
    return y + added.to(y.dtype), state + last


def _delta(dt: Tensor, dt_bias: Tensor, wide: torch.dtype) -> Tensor:
    return F.softplus(dt.to(wide) + dt_bias.to(wide))


def _from_initial_state(x, dt, A_log, C, dt_bias, initial_state, segment_ids) -> tuple[Tensor, Tensor]:
    """What the state before each document adds to its outputs [B, S, H, P], and to the final state [B, H, P, N]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, num_tokens, heads, _ = x.shape
    state = initial_state.to(wide).expand(batch, -1, -1, -1)
    if not num_tokens:
        return x.to(wide), state
    chunks = _Chunks.of(segment_ids, batch, num_tokens, x.device)
    steps = chunks.cut(_delta(dt, dt_bias, wide) * -torch.exp(A_log.to(wide)))  # [B, K, Q, H]
    within = torch.einsum("bkqs,bksh->bkqh", chunks.same_document.to(wide), steps)
    carry, handed = torch.zeros_like(within[:, 0, 0]), []
    for k in range(within.shape[1]):
        handed.append(carry)
        carry = within[:, k, -1] + chunks.goes_on[:, k, -1:] * carry
    total = within + torch.stack(handed, 1).unsqueeze(2) * chunks.goes_on.unsqueeze(-1)  # log, since the start
    decay = torch.exp(total.flatten(1, 2)[:, :num_tokens])
    groups = C.shape[2]
    seen = torch.einsum("bsgn,bgrpn->bsgrp", C.to(wide), state.unflatten(1, (groups, heads // groups)))
    return seen.flatten(2, 3) * decay.unsqueeze(-1), state * decay[:, -1, :, None, None]


def _scan_from_zero(x, dt, A_log, B, C, D, dt_bias, segment_ids) -> tuple[Tensor, Tensor]:
    """y [B, S, H, P] and final state [B, H, P, N] where every document starts from zero, wide."""
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, num_tokens, heads, width = x.shape
    groups, states = B.shape[2:]
    if not num_tokens:
        return x.to(wide), x.new_zeros(batch, heads, width, states, dtype=wide)
    chunks = _Chunks.of(segment_ids, batch, num_tokens, x.device)
    skip = D.to(wide)[:, None] * x.to(wide)
    x, delta, B, C = (chunks.cut(t.to(wide)) for t in (x, _delta(dt, dt_bias, wide), B, C))

    def by_group(t: Tensor, axis: int) -> Tensor:
        return t.unflatten(axis, (groups, heads // groups))

    # Sums of the decay's logarithm since the chunk's start [B, K, Q, H]: float64, because small differences of large
    # ones count; a product, because torch.cumsum is not deterministic on a GPU.
    earlier = torch.ones(chunks.size, chunks.size, dtype=torch.float64, device=x.device).tril()
    sums = torch.einsum("qs,bksh->bkqh", earlier, (delta * -torch.exp(A_log.to(wide))).double())
    dx = by_group(delta.unsqueeze(-1) * x, 3)  # [B, K, Q, G, R, P]

    by_head = sums.movedim(3, 2)  # [B, K, H, Q]
    distance = (by_head[..., :, None] - by_head[..., None, :]).to(wide)
    decay = by_group(torch.exp(distance.masked_fill(~chunks.same_document[:, :, None], -torch.inf)), 2)
    scores = torch.einsum("bkqgn,bksgn->bkgqs", C, B)
    y = torch.einsum("bkgrqs,bksgrp->bkqgrp", decay * scores.unsqueeze(3), dx)

    to_end = torch.exp((sums[:, :, -1:] - sums).to(wide)) * chunks.is_last.unsqueeze(-1)
    made = torch.einsum("bksgn,bksgrp->bkgrpn", B, dx * by_group(to_end, 3).unsqueeze(-1))
    sums = sums.to(wide)
    kept = by_group(torch.exp(sums[:, :, -1]) * chunks.goes_on[:, :, -1:], 2)[..., None, None]
    state, handed = torch.zeros_like(made[:, 0]), []
    for k in range(made.shape[1]):
        handed.append(state)
        state = kept[:, k] * state + made[:, k]
    from_start = torch.exp(sums) * chunks.goes_on.unsqueeze(-1)
    seen = torch.einsum("bkqgn,bkgrpn->bkqgrp", C, torch.stack(handed, 1))
    y = y + seen * by_group(from_start, 3).unsqueeze(-1)
    return y.flatten(3, 4).flatten(1, 2)[:, :num_tokens] + skip, state.flatten(1, 2)


@dataclass(frozen=True)
class _Chunks:
    """Rows of S tokens in K chunks of Q. Tokens that fill up the last one belong to the last document; what is put
    there must do nothing, which zeros do."""

    size: int  # Q
    padding: int
    same_document: Tensor  # bool [B, K, Q, Q]: the second is not after the first, and of its document
    is_last: Tensor  # bool [B, K, Q]: of the chunk's last document
    goes_on: Tensor  # bool [B, K, Q]: of the document that the chunk before ended with

    @classmethod
    def of(cls, segment_ids: Tensor | None, batch: int, num_tokens: int, device: torch.device) -> _Chunks:
        size = min(CHUNK_TOKENS, num_tokens)
        padding = -num_tokens % size
        if segment_ids is None:
            document = torch.zeros(batch, num_tokens, dtype=torch.int64, device=device)
        else:
            document = document_starts(segment_ids).long().cumsum(1)
        document = torch.cat((document, document[:, -1:].expand(-1, padding)), 1).unflatten(1, (-1, size))
        before = torch.cat((document[:, :1, 0], document[:, :-1, -1]), 1).unsqueeze(-1)
        same = (document[:, :, :, None] == document[:, :, None, :]).tril()
        return cls(size, padding, same, document == document[:, :, -1:], document == before)

    def cut(self, t: Tensor) -> Tensor:
        """[B, S, ...] -> [B, K, Q, ...]."""
        if self.padding:
            t = torch.cat((t, t.new_zeros(t.shape[0], self.padding, *t.shape[2:])), 1)
        return t.unflatten(1, (-1, self.size))
