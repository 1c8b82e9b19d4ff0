"""Triton kernels of the meta prefix in attention: every text query sees the same few meta keys.

:func:`merge_meta` turns attention over the text into attention over text and meta keys: it computes the scores of the
meta keys (one tile, they are few) and joins the two softmaxes by their log-sum-exp. :func:`meta_backward` is the part
of the backward pass that belongs to the meta keys; given the log-sum-exp of both parts together, a softmax's gradient
falls apart into one part for each set of keys (as in ring attention). Both in base e, float32 inside.
"""

import triton
import triton.language as tl


@triton.jit
def merge_meta(
    Q, K, V, TEXT, TEXT_LSE, OUT, LSE, num_rows, num_meta, seq, scale, q_row, heads, share,
    lse_batch, lse_head, lse_row,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """One block of rows of one query head.

    Q [R, H, DK] with row stride q_row; K [M, G, DK], V [M, G, DV], TEXT and OUT [R, H, DV] contiguous; R = B * S rows.
    TEXT_LSE and LSE float32: element (b, h, s) at b * lse_batch + h * lse_head + s * lse_row, for both.
    """
    head = tl.program_id(1)
    group = head // share
    groups = heads // share
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    meta, dk, dv = tl.arange(0, META), tl.arange(0, DK), tl.arange(0, DV)
    known = meta < num_meta
    q = tl.load(Q + rows[:, None] * q_row + head * DK + dk[None, :], mask=inside[:, None], other=0.0)
    k = tl.load(K + (meta[:, None] * groups + group) * DK + dk[None, :], mask=known[:, None], other=0.0)
    v = tl.load(V + (meta[:, None] * groups + group) * DV + dv[None, :], mask=known[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k)) * scale
    scores = tl.where(known[None, :], scores, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp(scores - top[:, None])
    total = tl.sum(weights, 1)
    meta_lse = top + tl.log(total)
    at = (rows // seq) * lse_batch + head * lse_head + (rows % seq) * lse_row
    text_lse = tl.load(TEXT_LSE + at, mask=inside, other=0.0)
    larger = tl.maximum(meta_lse, text_lse)
    lse = larger + tl.log(tl.exp(meta_lse - larger) + tl.exp(text_lse - larger))
    tl.store(LSE + at, lse, mask=inside)
    own = tl.dot(weights.to(v.dtype), v) * (tl.exp(top - lse))[:, None]
    place = (rows[:, None] * heads + head) * DV + dv[None, :]
    text = tl.load(TEXT + place, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(OUT + place, (own + text * tl.exp(text_lse - lse)[:, None]).to(OUT.dtype.element_ty), mask=inside[:, None])


@triton.jit
def meta_backward(
    Q, K, V, OUT, DOUT, LSE, DQ, DK_PART, DV_PART, num_rows, num_meta, seq, scale, q_row, heads, share,
    lse_batch, lse_head, lse_row,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, META: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of rows of one query head: adds the meta keys' part to DQ [R, H, DK] (contiguous), and writes the
    partial sums DK_PART [strips, H, META, DK], DV_PART [strips, H, META, DV] (float32) of this strip of rows."""
    strip, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // share
    groups = heads // share
    meta, dk, dv = tl.arange(0, META), tl.arange(0, DK), tl.arange(0, DV)
    known = meta < num_meta
    k = tl.load(K + (meta[:, None] * groups + group) * DK + dk[None, :], mask=known[:, None], other=0.0)
    v = tl.load(V + (meta[:, None] * groups + group) * DV + dv[None, :], mask=known[:, None], other=0.0)
    d_k = tl.zeros([META, DK], tl.float32)
    d_v = tl.zeros([META, DV], tl.float32)
    for block in range(BLOCKS):
        rows = (strip * BLOCKS + block) * ROWS + tl.arange(0, ROWS)
        inside = rows < num_rows
        q = tl.load(Q + rows[:, None] * q_row + head * DK + dk[None, :], mask=inside[:, None], other=0.0)
        place = (rows[:, None] * heads + head) * DV + dv[None, :]
        out = tl.load(OUT + place, mask=inside[:, None], other=0.0)
        d_out = tl.load(DOUT + place, mask=inside[:, None], other=0.0)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        at = (rows // seq) * lse_batch + head * lse_head + (rows % seq) * lse_row
        lse = tl.load(LSE + at, mask=inside, other=float("inf"))
        scores = tl.dot(k, tl.trans(q)) * scale  # [META, ROWS]
        weights = tl.where(known[:, None], tl.exp(scores - lse[None, :]), 0.0)
        d_v += tl.dot(weights.to(d_out.dtype), d_out)
        d_weights = tl.dot(v, tl.trans(d_out))
        d_scores = (weights * (d_weights - delta[None, :]) * scale).to(q.dtype)
        d_k += tl.dot(d_scores, q)
        place = (rows[:, None] * heads + head) * DK + dk[None, :]
        d_q = tl.load(DQ + place, mask=inside[:, None], other=0.0).to(tl.float32)
        d_q += tl.dot(tl.trans(d_scores), k)
        tl.store(DQ + place, d_q.to(DQ.dtype.element_ty), mask=inside[:, None])
    base = (strip * heads + head) * META
    tl.store(DK_PART + (base + meta[:, None]) * DK + dk[None, :], d_k)
    tl.store(DV_PART + (base + meta[:, None]) * DV + dv[None, :], d_v)
