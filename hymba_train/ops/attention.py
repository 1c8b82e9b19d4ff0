"""Attention over a window, the causal past and the meta prefix: signature, visibility rule, plain-torch backend.

Visibility (hymba-architecture 2.7): query i sees key j iff j <= i and (window is None, or i - j <= window, or j is a
meta token), within one document. A window W so holds W + 1 keys, the query's own among them. Meta tokens come before
all text, so text always sees every one of them, and distances between text tokens of a document need no positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta_q: Tensor,
    meta_k: Tensor,
    meta_v: Tensor,
    *,
    window: int | None,
    scale: float,
    kv_index: Tensor | None = None,
    segment_ids: Tensor | None = None,
    document_ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention of text and meta tokens; backend ``torch`` (any device, any floating dtype).

    Args:
        q: [B, S, H, dk], after RoPE, as is k.
        k: [B, S, G, dk].
        v: [B, S, G, dv]; dv may differ from dk.
        meta_q: [M, H, dk]; meta_k [M, G, dk]; meta_v [M, G, dv]: one copy for all rows; M may be 0.
        window: distance W to the furthest visible text key; None: all of the past.
        scale: factor of the scores, before the softmax.
        kv_index: int64 [H], KV head of each query head. None: h // (H // G).
        segment_ids: int64 [B, S], non-decreasing in a row, one number per document. None: one document a row.
        document_ends: int32, :func:`hymba_train.ops.segments.document_ends` of segment_ids, for backends that would
            else have to count them on the device; may end in empty documents.

    Returns:
        out [B, S, H, dv] and meta_out [M, H, dv], in q.dtype. Scores are accumulated and normalised in float32
        (float64 if q is).

    Queries are taken in blocks, each with just the keys that its window reaches.
    """
    num_tokens = q.shape[1]
    if kv_index is not None:
        k, v, meta_k, meta_v = (x.index_select(-2, kv_index) for x in (k, v, meta_k, meta_v))
    # On a CPU small blocks keep the scores in the cache; on a GPU large ones save kernel launches.
    block = 64 if q.device.type == "cpu" else 512
    out = []
    for first in range(0, num_tokens, block):
        last = min(first + block, num_tokens)
        low = 0 if window is None else max(0, first - window)
        keys = torch.cat((_rows(meta_k, k), k[:, low:last]), dim=1)
        values = torch.cat((_rows(meta_v, v), v[:, low:last]), dim=1)
        visible = visible_text(first, last, low, window, segment_ids, q.device)
        meta_visible = visible.new_ones(*visible.shape[:-1], meta_k.shape[0])
        out.append(_softmax_attention(q[:, first:last], keys, values, torch.cat((meta_visible, visible), -1), scale))
    meta_visible = visible_text(0, meta_q.shape[0], 0, None, None, q.device)
    meta_out = _softmax_attention(meta_q[None], meta_k[None], meta_v[None], meta_visible, scale)[0]
    return torch.cat(out, dim=1) if out else q.new_zeros(*q.shape[:-1], v.shape[-1]), meta_out


def visible_text(
    first: int, last: int, low: int, window: int | None, segment_ids: Tensor | None, device: torch.device
) -> Tensor:
    """bool [B or 1, last - first, last - low]: which of the text keys low..last each text query first..last sees."""
    query = torch.arange(first, last, device=device)[:, None]
    key = torch.arange(low, last, device=device)[None]
    visible = key <= query
    if window is not None:
        visible &= query - key <= window
    if segment_ids is None:
        return visible[None]
    return visible & (segment_ids[:, first:last, None] == segment_ids[:, None, low:last])


def _rows(meta: Tensor, text: Tensor) -> Tensor:
    """meta [M, G, d] as if every row of text [B, ...] had its own."""
    return meta.unsqueeze(0).expand(text.shape[0], *meta.shape)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """q [B, n, H, dk], k [B, T, G, dk], v [B, T, G, dv], visible bool [B or 1, n, T] -> [B, n, H, dv]."""
    batch, rows, heads, dk = q.shape
    keys, groups, dv = k.shape[1], k.shape[2], v.shape[-1]
    share = heads // groups
    # Query heads of one KV head are stacked as rows: one matrix product a KV head, keys are not repeated.
    q = (q * scale).view(batch, rows, groups, share, dk).permute(0, 2, 3, 1, 4).reshape(batch, groups, share * rows, dk)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).permute(0, 2, 3, 1)).view(batch, groups, share, rows, keys)
    scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    weights = scores.softmax(-1).to(v.dtype).view(batch, groups, share * rows, keys)
    out = (weights @ v.permute(0, 2, 1, 3)).view(batch, groups, share, rows, dv)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, rows, heads, dv)
