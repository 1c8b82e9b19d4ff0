"""Attention of text and meta tokens through cuDNN as one autograd function on flat rows.

The same kernels as :mod:`.attention_cudnn`, without what autograd would do around them: the output is not put together
from parts, the two gradients of the meta keys are added up once, and the host goes through one function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_train.ops import attention_cudnn, segments
from hymba_train.ops.attention_cudnn import MetaLaunch


def attention_rows_cudnn(
    meta_q: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    batch: int,
    window: int | None,
    scale: float,
    kv_index: Tensor | None = None,
    segment_ids: Tensor | None = None,
    document_ends: Tensor | None = None,
) -> Tensor:
    """:func:`hymba_train.ops.attention_rows.attention_rows`; needs meta tokens and text."""
    if segment_ids is not None and document_ends is None:
        document_ends = segments.document_ends(segment_ids)
    groups = k.shape[1] // q.shape[-1]
    dv = v.shape[1] // groups
    if kv_index is not None:
        k, v = (x.unflatten(1, (groups, -1)).index_select(1, kv_index).flatten(1) for x in (k, v))
    return _Rows.apply(meta_q, q, k, v, batch, dv, window, scale, document_ends)


class _Rows(torch.autograd.Function):
    """meta_q [M, H, dk], q [B * S, H, dk], k [N, G * dk], v [N, G * dv] -> [N, H * dv]."""

    @staticmethod
    def forward(ctx, meta_q, q, k, v, batch, dv, window, scale, ends):
        meta_q, q, k, v = (x.contiguous() for x in (meta_q, q, k, v))
        num_meta, heads, dk = meta_q.shape
        num_text = q.shape[0]
        ctx.settings = (num_meta, num_text, batch, dk, dv, window, scale)
        out = torch.empty(k.shape[0], heads * dv, dtype=q.dtype, device=q.device)
        out[num_meta + num_text :].zero_()
        text_q = q.unflatten(0, (batch, -1))
        (meta_k, text_k), (meta_v, text_v), (meta_out, text_out) = (
            _parts(x, num_meta, num_text, batch, width) for x, width in ((k, dk), (v, dv), (out, dv))
        )
        text, text_lse, rng_state = attention_cudnn.fused_forward(text_q, text_k, text_v, window, scale, ends)
        lse = torch.empty_like(text_lse)
        launch = MetaLaunch.of(text_q, meta_k, meta_v, lse, scale)
        launch.merge(text_q, meta_k, meta_v, text, text_lse, text_out, lse)
        own, own_lse, own_rng_state = attention_cudnn.fused_forward(
            meta_q[None], meta_k[None], meta_v[None], None, scale, None
        )
        meta_out.copy_(own[0])
        ctx.save_for_backward(meta_q, q, k, v, out, lse, rng_state, own_lse, own_rng_state, ends)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        meta_q, q, k, v, out, lse, rng_state, own_lse, own_rng_state, ends = ctx.saved_tensors
        num_meta, num_text, batch, dk, dv, window, scale = ctx.settings
        text_q = q.unflatten(0, (batch, -1))
        (meta_k, text_k), (meta_v, text_v), (meta_out, text_out), (d_meta, d_text) = (
            _parts(x, num_meta, num_text, batch, width)
            for x, width in ((k, dk), (v, dv), (out, dv), (d_out.contiguous(), dv))
        )
        d_q, d_text_k, d_text_v = attention_cudnn.fused_backward(
            text_q, text_k, text_v, text_out, d_text, lse, rng_state, window, scale, ends
        )
        launch = MetaLaunch.of(text_q, meta_k, meta_v, lse, scale)
        from_text = launch.backward(text_q, meta_k, meta_v, text_out, d_text, lse, d_q)
        d_meta_q, *of_meta = attention_cudnn.fused_backward(
            meta_q[None], meta_k[None], meta_v[None], meta_out[None], d_meta[None], own_lse, own_rng_state,
            None, scale, None,
        )  # fmt: skip
        d_k, d_v = torch.empty_like(k), torch.empty_like(v)
        for whole, width, text, *both in zip(
            (d_k, d_v), (dk, dv), (d_text_k, d_text_v), from_text, of_meta, strict=True
        ):
            meta_rows, text_rows = _parts(whole, num_meta, num_text, batch, width)
            torch.add(both[0], both[1][0], out=meta_rows)
            text_rows.copy_(text)
            whole[num_meta + num_text :].zero_()
        return d_meta_q[0], d_q.flatten(0, 1), d_k, d_v, None, None, None, None, None


def _parts(rows: Tensor, num_meta: int, num_text: int, batch: int, width: int) -> tuple[Tensor, Tensor]:
    """Contiguous rows [N, heads * width] as meta [M, heads, width] and text [B, S, heads, width]."""
    meta, text = rows[:num_meta], rows[num_meta : num_meta + num_text]
    return meta.view(num_meta, -1, width), text.view(batch, num_text // batch, -1, width)
