"""Triton kernels of the meta prefix in attention: every text query sees the same few meta keys.

:func:`merge_meta` turns attention over the text into attention over text and meta keys: it computes the scores of the
meta keys (one tile, they are few) and joins the two softmaxes by their log-sum-exp. :func:`meta_backward` is the part
of the backward pass that belongs to the meta keys; given the log-sum-exp of both parts together, a softmax's gradient
falls apart into one part for each set of keys (as in ring attention). float32 inside.

A program holds the meta keys of one KV head and takes ``items`` items in turn, an item being a block of ROWS rows of
one of the ``share`` query heads of that KV head: keys are loaded once, and gradients of keys are added up in registers.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _meta_rows(X, group, groups, num_meta, META: tl.constexpr, WIDTH: tl.constexpr):
    """[META, WIDTH] of one KV head from X [M, G, WIDTH], zero past M."""
    meta, c = tl.arange(0, META)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(X + (meta * groups + group) * WIDTH + c, mask=meta < num_meta, other=0.0)


@triton.jit
def _lse_places(first, seq, head, lse_batch, lse_head, lse_row, ROWS: tl.constexpr, LONG: tl.constexpr):
    """Where the log-sum-exp of rows first .. first + ROWS - 1 lies. LONG: a sequence has at least ROWS rows, so that
    they are of two sequences at most and one division is enough."""
    if LONG:
        batch, s = first // seq, (first % seq).to(tl.int32) + tl.arange(0, ROWS)
        base = batch * lse_batch + head * lse_head
        return base + tl.where(s < seq, s * lse_row, lse_batch + (s - seq) * lse_row)
    else:
        rows = first + tl.arange(0, ROWS)
        return (rows // seq) * lse_batch + head * lse_head + (rows % seq) * lse_row


@triton.jit
def merge_meta(
    Q, K, V, TEXT, TEXT_LSE, OUT, LSE, num_rows, num_meta, seq, scale, q_row, heads, share, items,
    lse_batch, lse_head, lse_row,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, META: tl.constexpr, LONG: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Q [R, H, DK] with row stride q_row; K [M, G, DK], V [M, G, DV], TEXT and OUT [R, H, DV] contiguous; R = B * S.

    TEXT_LSE and LSE float32: element (b, h, s) at b * lse_batch + h * lse_head + s * lse_row, for both.
    """
    group = tl.program_id(1)
    meta, dk, dv, row = tl.arange(0, META), tl.arange(0, DK), tl.arange(0, DV), tl.arange(0, ROWS)
    k = _meta_rows(K, group, heads // share, num_meta, META, DK)
    v = _meta_rows(V, group, heads // share, num_meta, META, DV)
    start = tl.program_id(0) * items
    for item in tl.range(start, tl.minimum(start + items, tl.cdiv(num_rows, ROWS) * share), num_stages=STAGES):
        head, first = group * share + item % share, (item // share).to(tl.int64) * ROWS
        inside = row < num_rows - first
        q_place = Q + first * q_row + head * DK + (row[:, None] * q_row + dk[None, :])
        place = (first * heads + head) * DV + (row[:, None] * (heads * DV) + dv[None, :])
        at = _lse_places(first, seq, head, lse_batch, lse_head, lse_row, ROWS, LONG)
        q = tl.load(q_place, mask=inside[:, None], other=0.0)
        text = tl.load(TEXT + place, mask=inside[:, None], other=0.0)
        text_lse = tl.load(TEXT_LSE + at, mask=inside, other=0.0) * LOG2_E
        scores = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
        scores = tl.where((meta < num_meta)[None, :], scores, float("-inf"))
        top = tl.maximum(tl.max(scores, 1), text_lse)
        weights = tl.exp2(scores - top[:, None])
        text_weight = tl.exp2(text_lse - top)
        total = tl.sum(weights, 1) + text_weight
        tl.store(LSE + at, (top + tl.log2(total)) * LN_2, mask=inside)
        out = tl.dot(weights.to(v.dtype), v) + text.to(tl.float32) * text_weight[:, None]
        tl.store(OUT + place, (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside[:, None])


@triton.jit
def meta_backward(
    Q, K, V, OUT, DOUT, LSE, DQ, PARTIAL, num_rows, num_meta, seq, scale, q_row, heads, share, items,
    lse_batch, lse_head, lse_row,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, META: tl.constexpr, LONG: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the meta keys' part to DQ [R, H, DK] (contiguous), and writes the sums of this program's items to PARTIAL,
    float32 [strips, M, G, DK + DV]: the gradients of K and of V side by side."""
    group = tl.program_id(1)
    meta, dk, dv, row = tl.arange(0, META), tl.arange(0, DK), tl.arange(0, DV), tl.arange(0, ROWS)
    k = _meta_rows(K, group, heads // share, num_meta, META, DK)
    v = _meta_rows(V, group, heads // share, num_meta, META, DV)
    d_k = tl.zeros([META, DK], tl.float32)
    d_v = tl.zeros([META, DV], tl.float32)
    start = tl.program_id(0) * items
    for item in tl.range(start, tl.minimum(start + items, tl.cdiv(num_rows, ROWS) * share), num_stages=STAGES):
        head, first = group * share + item % share, (item // share).to(tl.int64) * ROWS
        inside = row < num_rows - first
        q_place = Q + first * q_row + head * DK + (row[:, None] * q_row + dk[None, :])
        place = (first * heads + head) * DV + (row[:, None] * (heads * DV) + dv[None, :])
        d_q_place = DQ + (first * heads + head) * DK + (row[:, None] * (heads * DK) + dk[None, :])
        at = _lse_places(first, seq, head, lse_batch, lse_head, lse_row, ROWS, LONG)
        # All loads first: none waits for a product.
        q = tl.load(q_place, mask=inside[:, None], other=0.0)
        d_out = tl.load(DOUT + place, mask=inside[:, None], other=0.0)
        out = tl.load(OUT + place, mask=inside[:, None], other=0.0)
        lse = tl.load(LSE + at, mask=inside, other=float("inf")) * LOG2_E
        d_q = tl.load(d_q_place, mask=inside[:, None], other=0.0)
        scores = tl.dot(k, tl.trans(q)) * (scale * LOG2_E)  # [META, ROWS]
        d_weights = tl.dot(v, tl.trans(d_out))
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        weights = tl.where((meta < num_meta)[:, None], tl.exp2(scores - lse[None, :]), 0.0)
        d_scores = (weights * (d_weights - delta[None, :])).to(q.dtype)  # still without the scale
        d_v += tl.dot(weights.to(d_out.dtype), d_out)
        d_k += tl.dot(d_scores, q)
        d_q = d_q.to(tl.float32) + tl.dot(tl.trans(d_scores), k) * scale
        tl.store(d_q_place, d_q.to(DQ.dtype.element_ty), mask=inside[:, None])
    line = (tl.program_id(0) * num_meta + meta[:, None]) * tl.num_programs(1) + group
    known = (meta < num_meta)[:, None]
    tl.store(PARTIAL + line * (DK + DV) + dk[None, :], d_k * scale, mask=known)
    tl.store(PARTIAL + line * (DK + DV) + DK + dv[None, :], d_v, mask=known)
