"""Attention on the flat token axis: meta tokens first, then the text of every sequence, then padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hymba_train.ops.gradient_slots import split_rows
from hymba_train.ops.registry import Choice


def attention_rows(
    attention: Choice, meta_q: Tensor, q: Tensor, k: Tensor, v: Tensor, *, batch: int, **kwargs: Any
) -> Tensor:
    """:func:`hymba_train.ops.attention.attention` by the chosen backend, from rows to rows.

    Args:
        meta_q, q: [M, H, dk] and [B * S, H, dk], after RoPE.
        k, v: [N, G * dk] and [N, G * dv], rows of meta tokens, text and padding.
        batch: B.
        kwargs: those of attention.

    Returns:
        [N, H * dv], zero in the rows of padding.

    Of the backend ``cudnn`` all is one autograd function, in which every part writes its rows of one output; around the
    others the rows are split and joined.
    """
    if attention.name == "cudnn" and q.numel() and meta_q.numel():
        from hymba_train.ops.attention_rows_cudnn import attention_rows_cudnn

        return attention_rows_cudnn(meta_q, q, k, v, batch=batch, **kwargs)
    num_meta, num_text = meta_q.shape[0], q.shape[0]
    counts = [num_meta, num_text, k.shape[0] - num_meta - num_text]
    groups = k.shape[1] // q.shape[-1]
    (meta_k, k, _), (meta_v, v, _) = (
        [part.unflatten(1, (groups, -1)) for part in split_rows(x, counts)] for x in (k, v)
    )
    q, k, v = (x.unflatten(0, (batch, num_text // batch)) for x in (q, k, v))
    text, meta = attention(q, k, v, meta_q, meta_k, meta_v, **kwargs)
    parts = [meta.flatten(1), text.flatten(0, 1).flatten(1)]
    if counts[2]:
        parts.append(parts[1].new_zeros(counts[2], parts[1].shape[1]))
    return torch.cat(parts)
