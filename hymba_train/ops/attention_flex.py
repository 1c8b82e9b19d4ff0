"""Attention through FlexAttention: one block-sparse kernel over the keys [meta | text] (PyTorch >= 2.5, on a GPU).

Text queries see all meta keys and their window of the text; the meta queries, the same for every row, are a small
causal call of their own. The block mask depends on sizes alone, or on segment_ids as well; both kinds are kept and
shared by the layers (:mod:`hymba_train.ops.attention_blocks` makes them, without a dense mask).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hymba_train.ops.attention_blocks import MaskMod, block_mask


def attention_flex(
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
    """:func:`hymba_train.ops.attention.attention`; backend ``flex``. On a CPU it runs forward only, uncompiled.

    dk and dv must each be at least 16 on a GPU (tensor-core tiles).
    """
    batch, num_tokens, num_meta = q.shape[0], q.shape[1], meta_k.shape[0]
    if kv_index is not None:
        k, v, meta_k, meta_v = (x.index_select(-2, kv_index) for x in (k, v, meta_k, meta_v))
    keys = torch.cat((meta_k.unsqueeze(0).expand(batch, *meta_k.shape), k), dim=1)
    values = torch.cat((meta_v.unsqueeze(0).expand(batch, *meta_v.shape), v), dim=1)
    if num_tokens:
        mask = _text_block_mask(num_tokens, num_meta, window, segment_ids, q.device)
        out = _attend(q, keys, values, mask, scale)
    else:
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    if num_meta == 0:
        return out, meta_q.new_zeros(*meta_q.shape[:-1], v.shape[-1])
    meta_mask = _plain_block_mask(num_meta, 0, None, q.device)
    return out, _attend(meta_q[None], meta_k[None], meta_v[None], meta_mask, scale)[0]


def mask_mod(num_meta: int, window: int | None, segment_ids: Tensor | None) -> MaskMod:
    """Visibility of key j in [meta | text] to text query i, as FlexAttention asks for it (batch, head, i, j)."""

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        key = j - num_meta  # as a text token; negative for meta tokens
        near = key <= i
        if window is not None:
            near = near & (i - key <= window)
        if segment_ids is not None:
            near = near & (segment_ids[b, i] == segment_ids[b, key.clamp(min=0)])
        return near | (key < 0)

    return visible


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """q [B, n, H, dk], k [B, T, G, dk], v [B, T, G, dv] -> [B, n, H, dv]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = dict(block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    out = _compiled()(q, k, v, **options) if q.is_cuda else flex_attention(q, k, v, **options)
    assert isinstance(out, Tensor)  # without return_lse
    return out.transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # Shapes are few and fixed in a run: static ones give the faster kernel, one compilation a (shape, mask, grad mode).
    # Past its limit dynamo would run flex_attention uncompiled, with dense scores: raise the limit, and let fullgraph
    # turn that into an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=16)
def _plain_block_mask(num_queries: int, num_meta: int, window: int | None, device: torch.device) -> BlockMask:
    """Without segments. With num_meta = 0 and no window it is the causal mask of the meta tokens themselves."""
    return block_mask(num_queries, num_meta, window, None, mask_mod(num_meta, window, None), device)


# segment_ids of the micro-batch at hand, the version of its contents, and its block masks by (num_meta, window).
_segment_masks: tuple[Tensor, int, dict[tuple[int, int | None], BlockMask]] | None = None


def _text_block_mask(
    num_tokens: int, num_meta: int, window: int | None, segment_ids: Tensor | None, device: torch.device
) -> BlockMask:
    global _segment_masks
    if segment_ids is None:
        return _plain_block_mask(num_tokens, num_meta, window, device)
    kept = _segment_masks
    version = -1 if segment_ids.is_inference() else segment_ids._version  # inference tensors do not count changes
    if kept is None or kept[0] is not segment_ids or kept[1] != version or version == -1:
        _segment_masks = kept = (segment_ids, version, {})
    masks = kept[2]
    if (num_meta, window) not in masks:
        visible = mask_mod(num_meta, window, segment_ids)
        masks[num_meta, window] = block_mask(num_tokens, num_meta, window, segment_ids, visible, device)
    return masks[num_meta, window]
